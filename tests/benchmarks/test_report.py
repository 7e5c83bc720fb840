"""What the benchmarks share: the check before any rate, the files, the timing."""

import json

import pytest
import torch
from matplotlib.figure import Figure

from trunkline.benchmarks.report import (
    OK,
    OUT_OF_TIME,
    Deadline,
    Report,
    as_accurate,
    median_seconds,
)


def test_a_result_may_be_twice_as_far_off_as_plain_torch_and_no_further():
    truth = [torch.ones(4), torch.ones(4)]
    plain = [x + 0.01 for x in truth]
    assert as_accurate([x + 0.0199 for x in truth], plain, truth) == OK
    assert as_accurate([truth[0], truth[1] + 0.0202], plain, truth).startswith("wrong: result 1 is off by 0.04")
    assert as_accurate([truth[0] * float("nan"), truth[1]], plain, truth).startswith("wrong: result 0")


def test_a_deadline_passes_when_its_minutes_are_over_and_none_never_does():
    assert Deadline(0).passed()
    assert not Deadline(10).passed()
    assert 590 < Deadline(10).seconds_left() <= 600
    assert Deadline(None).seconds_left() == float("inf")


def test_what_was_measured_is_on_disk_when_a_later_job_dies(tmp_path):
    report = Report("toy", "A toy", torch.device("cpu"), tmp_path)
    rows = [report.add(contender="ours", tokens=n, status=OUT_OF_TIME) for n in (1, 2, 3)]

    def fill_in(row):
        if row["tokens"] == 2:
            raise KeyboardInterrupt
        row["status"] = OK

    with pytest.raises(KeyboardInterrupt):
        report.measure(rows, fill_in, Deadline(None))
    (path,) = tmp_path.glob("*/toy.json")
    assert [row["status"] for row in json.loads(path.read_text())["rows"]] == [OK, OUT_OF_TIME, OUT_OF_TIME]
    assert {path.name for path in path.parent.iterdir()} == {"toy.csv", "toy.json", "toy.md"}


def test_only_our_own_have_to_run(tmp_path):
    report = Report("toy", "A toy", torch.device("cpu"), tmp_path)
    report.add(contender="theirs", status="not run: absent")
    report.add(contender="ours", status=OUT_OF_TIME)
    assert report.red == []
    failed = report.add(contender="ours, deterministic", status="not run: OutOfResources")
    assert report.red == [failed]


def test_a_cpu_is_timed_at_least_three_times():
    calls = []
    assert 0 <= median_seconds(lambda: calls.append(0), torch.device("cpu"), budget_s=0) < 0.1
    assert len(calls) >= 4


def test_a_wrong_result_makes_the_status_1_and_is_not_drawn(tmp_path, capsys):
    report = Report("toy", "A toy", torch.device("cpu"), tmp_path)
    report.add(contender="ours", tokens=20136, rate=1.23456, status=OK)
    report.add(contender="theirs", tokens=20136, rate=None, status="not run: absent")
    drawn = []

    def draw(rows):
        drawn.append(rows)
        return Figure()

    assert report.write(draw) == 0
    report.add(contender="mine", tokens=1, rate=None, status="wrong: result 0")
    assert report.write(draw) == 1
    assert [row["contender"] for row in drawn[1]] == ["ours"]
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("cpu")
    written = json.loads((folder / "toy.json").read_text())
    assert written["rows"] == report.rows
    assert {"device", "versions", "date", "command", "commit"} <= written.keys()
    assert (folder / "toy.csv").read_text().splitlines() == [
        "contender,tokens,rate,status",
        "ours,20136,1.23456,ok",
        "theirs,20136,,not run: absent",
        "mine,1,,wrong: result 0",
    ]
    text = (folder / "toy.md").read_text()
    assert text in capsys.readouterr().out
    assert "| ours | 20,136 | 1.23 | ok |" in text
    assert "rates of a CPU" in text
