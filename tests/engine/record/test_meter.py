"""Throughput: time a step without what is no step."""

from __future__ import annotations

import time

import pytest
import torch

from trunkline.engine.ranks.distributed import Ranks
from trunkline.engine.record.meter import Meter


def meter(peak: float | None = None) -> Meter:
    return Meter(Ranks(0, 2, 0, torch.device("cpu")), unit="words", flops=1e6, peak=peak)


def test_what_is_done_in_a_pause_does_not_count_and_what_came_before_it_does() -> None:
    clock = time.perf_counter
    made = clock()
    measured = meter()
    begun = clock()
    taken = [measured.add(32, 100.0)]
    before = clock()
    taken.append(measured.add(1, 28.0))
    after = clock()
    with measured.paused():
        paused = clock()
        time.sleep(0.05)
        paused = clock() - paused
    left_out = clock() - after
    values = measured.read()
    ends = clock()
    third = measured.add(32, 1.0)
    assert before - begun <= sum(taken) <= after - made
    assert ends - after - left_out <= third <= clock() - before - paused
    assert values["step_time_s"] == pytest.approx(sum(taken) / 2)
    assert values["samples_per_s"] == pytest.approx(33 / sum(taken))
    assert values["words_per_s"] == pytest.approx(128 / sum(taken))


def test_utilisation_is_the_share_of_the_peak_of_all_ranks() -> None:
    measured = meter(peak=1e9)
    measured.add(32, 100.0)
    values = measured.read()
    assert values["mfu"] == pytest.approx(values["samples_per_s"] * 1e6 / 2e9)
    unknown = meter()
    unknown.add(32, 100.0)
    assert "mfu" not in unknown.read()
