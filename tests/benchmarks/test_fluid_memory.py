from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from tests.models.fluid.csv_tree import write_case
from trunkline.benchmarks import fluid_memory as bench_memory
from trunkline.benchmarks.flags import memory
from trunkline.engine.errors import ConfigError, DataError


def arguments(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    memory(parser)
    return parser.parse_args(flags)


def test_a_peak_is_what_the_program_used() -> None:
    touched = "import time; held = bytearray(b'x') * (300 << 20); del held; time.sleep(0.1); print(1.5)"
    peak, printed = bench_memory.peak_of(touched)
    assert 300 < peak < 340
    assert printed == 1.5


def test_a_program_that_fails_is_no_measurement() -> None:
    with pytest.raises(DataError, match="ended with status 3"):
        bench_memory.peak_of("raise SystemExit(3)")


@pytest.mark.slow
def test_preparing_reading_and_training_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--case", str(write_case(tmp_path)), "--counts", "2", "--windows", "50", "--steps", "2"]
    assert bench_memory.run(arguments(*flags)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r" +2 +\d+ MiB +[\d.]+ +\d+ MiB +[\d.]+ +\d+ MiB +[\d.]+", lines[1])
    assert lines[2].startswith("largest growth from 2 cases on: 0 MiB")


@pytest.mark.parametrize("counts", ["1", "5,x", ""])
def test_counts_that_make_no_sense_are_refused(counts: str) -> None:
    with pytest.raises(ConfigError, match="--counts"):
        bench_memory.run(arguments("--counts", counts))
