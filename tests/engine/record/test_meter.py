"""Throughput: time a step without what is no step."""

from __future__ import annotations

import time

import pytest
import torch

from trunkline.engine.config.deepspeed_section import BatchSizes
from trunkline.engine.record.meter import Meter


def meter(peak: float | None = None) -> Meter:
    return Meter(BatchSizes(32, 8, 2, 2), torch.device("cpu"), step=5, unit="words", flops=1e6, peak=peak)


def test_what_is_done_in_a_pause_does_not_count_and_what_came_before_it_does() -> None:
    measured = meter()
    time.sleep(0.2)  # two steps
    for weight in (100.0, 28.0):
        measured.add(torch.tensor(weight))
    with measured.paused():
        time.sleep(0.5)
    values = measured.read(7)
    assert 0.1 <= values["step_time_s"] < 0.2
    assert values["samples_per_s"] == pytest.approx(32 / values["step_time_s"])
    assert values["words_per_s"] == pytest.approx(64 / values["step_time_s"])
    assert measured.read(8)["step_time_s"] < 0.1


def test_utilisation_is_the_share_of_the_peak_of_all_ranks() -> None:
    measured = meter(peak=1e9)
    time.sleep(0.05)
    values = measured.read(6)
    assert values["mfu"] == pytest.approx(values["samples_per_s"] * 1e6 / 2e9)
    assert "mfu" not in meter().read(6)
