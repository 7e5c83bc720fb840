"""The flags that the benchmarks share, and names that stand both in flags and in what they choose among."""

from __future__ import annotations

import argparse

import pytest

from trunkline.benchmarks.flags import PASSES, integers, minutes
from trunkline.kernels.attention.tiles import TILES


def test_numbers_are_read_and_other_text_is_refused() -> None:
    assert integers("32,64") == [32, 64]
    for text in ("", "0", "32,", "a", "-1"):
        with pytest.raises(argparse.ArgumentTypeError, match="32,64"):
            integers(text)


def test_a_budget_is_a_number_of_minutes() -> None:
    assert minutes("2.5") == 2.5
    for text in ("", "-1", "two", "nan", "inf"):
        with pytest.raises(argparse.ArgumentTypeError, match="number of minutes"):
            minutes(text)


def test_every_pass_that_can_be_swept_has_tiles() -> None:
    assert {name for architecture, bits, name in TILES if (architecture, bits) == (90, 16)} - {"backward_delta"} == set(
        PASSES
    )
