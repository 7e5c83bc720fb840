"""Trackers that fail, fill up or come late: every row is handed over in order, or is missed by name."""

from __future__ import annotations

import resource
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.engine.record.test_metrics_file import strict
from trunkline.engine.machine.output import lasting_output
from trunkline.engine.record.metrics_file import MetricsFile, read_metrics
from trunkline.engine.record.trackers import At, Trackers, make_trackers


class _Away:
    """A server that fails at calls `first` to `last`, counted from 1."""

    name = "away"

    def __init__(self, first: int, last: int) -> None:
        self.calls, self.first, self.last = 0, first, last
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, split: str, values: Mapping[str, float], at: At) -> None:
        self.calls += 1
        if self.first <= self.calls <= self.last:
            raise RuntimeError("the server is gone")
        self.rows.append((step, dict(values)))

    def close(self) -> None:
        pass


def test_a_tracker_that_fails_gets_its_rows_later_after_one_warning_and_the_others_miss_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = _Away(2, 4)
    trackers = Trackers([away, MetricsFile.open(tmp_path / "metrics.jsonl")])
    for step in range(1, 6):
        trackers.log(step, "train", {"loss": 1.0 / step})
    trackers.close()
    assert away.rows == [(step, {"loss": 1.0 / step}) for step in range(1, 6)]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    message = capsys.readouterr().out
    assert message.count("warning") == 1
    assert "away fails (RuntimeError: the server is gone)" in message


def test_a_tracker_that_never_works_again_is_named_at_the_end_with_what_it_lacks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    trackers = Trackers([_Away(2, 10**9)])
    for step in range(1, 6):
        trackers.log(step, "train", {"loss": 1.0})
    trackers.close()
    assert "away did not take the last 4 rows" in capsys.readouterr().out


def test_a_tracker_that_takes_long_to_fail_is_not_asked_at_every_row() -> None:
    class Slow(_Away):
        def log(self, step: int, split: str, values: Mapping[str, float], at: At) -> None:
            time.sleep(0.2)
            super().log(step, split, values, at)

    slow = Slow(1, 10**9)
    trackers = Trackers([slow])
    for step in range(1, 20):
        trackers.log(step, "train", {"loss": 1.0})
    assert slow.calls == 1  # the next one is due after four seconds


def test_a_tracker_that_cannot_start_is_started_later_with_all_rows(tmp_path: Path) -> None:
    away, tries = _Away(0, 0), iter([OSError("no network"), OSError("no network")])

    def make() -> _Away:
        if error := next(tries, None):
            raise error
        return away

    trackers = Trackers()
    trackers.add("away", make)
    for step in range(1, 4):
        trackers.log(step, "train", {"loss": 1.0})
    trackers.close()
    assert [step for step, _ in away.rows] == [1, 2, 3]


def test_a_row_that_cannot_be_written_at_all_does_not_stand_in_the_way_of_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trackers = make_trackers([], tmp_path, {})
    trackers.log(1, "val", {"loss": "many"})  # type: ignore[dict-item]
    trackers.log(2, "val", {"loss": 1.0})
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2]
    assert "metrics.jsonl cannot take the row of step 1" in capsys.readouterr().out


@contextmanager
def no_room_beyond(size: int) -> Iterator[None]:
    """Every file of this process ends at `size` bytes: what a full disk does, a write that is cut short included."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with lasting_output():  # pytest's own record of what is printed is such a file too
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.fault("disk full for metrics.jsonl, for a while")
@pytest.mark.parametrize("room", [0, 60, 61, 130])
def test_rows_that_found_no_room_are_written_in_order_when_there_is_room_again(tmp_path: Path, room: int) -> None:
    """With room for a part of a row too: no line is torn at any moment."""
    path = tmp_path / "metrics.jsonl"
    trackers = Trackers([MetricsFile.open(path)])
    trackers.log(1, "train", {"loss": 1.0})
    with no_room_beyond(path.stat().st_size + room):
        for step in range(2, 6):
            trackers.log(step, "train", {"loss": 1.0 / step})
            assert all(strict(line) for line in path.read_text().splitlines())
        assert len(read_metrics(path)) < 5
    trackers.log(6, "train", {"loss": 0.0})
    trackers.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    assert path.read_text().count("\n") == 6


@pytest.mark.fault("disk full for metrics.jsonl until the last row")
def test_rows_that_found_no_room_are_tried_once_more_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    trackers = Trackers([MetricsFile.open(path)])
    with no_room_beyond(0):
        trackers.log(1, "train", {"loss": 1.0})
    trackers.close()
    assert [row["step"] for row in read_metrics(path)] == [1]
