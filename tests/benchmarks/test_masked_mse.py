import argparse
import csv
import importlib
import os
import signal

import pytest
import torch

from trunkline.benchmarks import masked_mse as bench_masked_mse
from trunkline.benchmarks.flags import masked_mse as add_flags
from trunkline.benchmarks.masked_mse import bytes_to_move, problem, run
from trunkline.benchmarks.report import OK, OUT_OF_TIME, Deadline, Report


def run_small(tmp_path, monkeypatch, *flags):
    """Run it where there is no compiler: those of torch.compile are not run, and say so."""

    def no_compiler(*_, **__):
        def call(*_):
            raise RuntimeError("no compiler here\nand more lines")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    parser = argparse.ArgumentParser()
    add_flags(parser)
    status = run(parser.parse_args(["--out", str(tmp_path), "--quick", "--values", "500,1000", "--rows", "64", *flags]))
    (path,) = tmp_path.glob("*/masked_mse.csv")
    return status, list(csv.DictReader(path.open()))


def test_every_contender_has_a_rate_or_a_reason(tmp_path, monkeypatch):
    status, rows = run_small(tmp_path, monkeypatch)
    assert status == 0
    assert len(rows) == 3 * 3 * 2
    for row in rows:
        if row["contender"] == "torch.compile":
            assert row["status"] == "not run: RuntimeError: no compiler here"
            assert row["gb_per_s"] == ""
        else:
            assert row["status"] == "ok"
            seconds, gigabytes = float(row["median_ms"]) / 1e3, float(row["gigabytes"])
            assert abs(float(row["gb_per_s"]) - gigabytes / seconds) < 1e-6 * gigabytes / seconds
    assert {path.suffix for path in tmp_path.glob("*/masked_mse.*")} == {".csv", ".md", ".json", ".png"}


def test_a_wrong_sum_shows_no_rate(tmp_path, monkeypatch):
    right = bench_masked_mse.masked_mse
    monkeypatch.setattr(bench_masked_mse, "masked_mse", lambda pred, target, mask: right(pred, target, None))
    status, rows = run_small(tmp_path, monkeypatch)
    assert status == 1
    for row in rows:
        if (row["kernel"], row["contender"]) == ("masked_mse", "ours"):
            assert row["status"].startswith("wrong: ")
            assert row["gb_per_s"] == row["median_ms"] == ""


def test_bytes_are_those_that_have_to_move():
    _, _, inputs, mask = problem("masked_mse", 100, torch.device("cpu"))
    assert bytes_to_move(inputs, mask) == {"forward": 100 * (2 + 4 + 1), "backward": 100 * (2 + 4 + 1 + 2)}
    _, _, inputs, _ = problem("linear_masked_mse", 10, torch.device("cpu"))
    mask = torch.arange(10) < 7
    hidden, weight, bias = 2 * 7 * 384, 2 * 384, 2
    assert bytes_to_move(inputs, mask) == {
        "forward": hidden + weight + bias + 10 * (4 + 1),
        "backward": hidden + weight + 10 * 4 + (2 * 10 * 384 + weight + bias),
    }


def test_out_of_time_the_table_is_whole_and_says_so(tmp_path, monkeypatch):
    status, rows = run_small(tmp_path, monkeypatch, "--minutes", "0")
    assert status == 0
    assert len(rows) == 3 * 3 * 2
    assert {row["status"] for row in rows} == {OUT_OF_TIME}


def test_ours_comes_first_at_every_size(tmp_path):
    report = Report("masked_mse", "", torch.device("cpu"), tmp_path)
    jobs = bench_masked_mse._jobs(report, [("masked_mse", 10), ("masked_mse", 20), ("linear_masked_mse", 10)])
    assert [job.contender for job in jobs] == ["ours"] * 3 + ["eager"] * 3 + ["torch.compile"] * 3


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Sweeps the kernels at these sizes with one choice beside the shipped one: the exit status and the report."""

    def run(sizes, minutes=None):
        monkeypatch.setattr(bench_masked_mse, "AIMED_AT", sizes)
        choice = {"TILE": (1024,), "NUM_WARPS": (4,), "PROGRAMS_PER_SM": (2,), "STAGES": (2,)}
        monkeypatch.setattr(bench_masked_mse, "CONSTANTS", choice)
        report = Report("sweep", "", torch.device("cpu"), tmp_path)
        return bench_masked_mse._sweep(report, 1e9, Deadline(minutes)), report

    return run


def test_a_sweep_times_what_is_right_and_leaves_the_constants_alone(interpreter, tmp_path, sweep, monkeypatch):
    # not masked_mse: the interpreter rounds its bf16 gradients towards zero, more than the check allows
    module = importlib.import_module("trunkline.kernels.linear_masked_mse")
    names = ("TILE", "NUM_WARPS", "PROGRAMS_PER_SM", "STAGES")
    tiling, used = module._tiling, set()

    def constants(prefix=""):
        return tuple(getattr(module, prefix + name) for name in names)

    def note(hidden, *chosen):
        used.add(chosen)
        return tiling(hidden, *chosen)

    shipped, backward = constants(), constants("BACKWARD_")

    monkeypatch.setattr(module, "_tiling", note)
    status, report = sweep({"linear_masked_mse": 100})
    assert status == 0
    assert used == {shipped, backward, (1024, 4, 2, 2)}
    assert (constants(), constants("BACKWARD_")) == (shipped, backward)
    found = {tuple(row[name.lower()] for name in names): (row["shipped"], row["status"]) for row in report.rows}
    assert found == {shipped: (True, OK), (1024, 4, 2, 2): (False, OK)}
    assert all(row["forward"] > 0 and row["backward"] > 0 for row in report.rows)
    assert {path.suffix for path in tmp_path.glob("*/sweep.*")} == {".csv", ".md", ".json", ".png"}


def test_a_sweep_that_finds_a_wrong_result_has_status_1(sweep, monkeypatch):
    monkeypatch.setattr(bench_masked_mse, "as_accurate", lambda *_: "wrong: result 0")
    status, report = sweep({"masked_mse": 1000})
    assert status == 1
    assert all(row["status"].startswith("wrong: ") and row["forward"] is None for row in report.rows)


def test_a_sweep_out_of_time_has_all_rows_and_makes_no_problem(sweep, monkeypatch):
    made = []
    monkeypatch.setattr(bench_masked_mse, "problem", lambda *arguments: made.append(arguments))
    status, report = sweep({"masked_mse": 1000, "linear_masked_mse": 300}, minutes=0)
    assert (status, made) == (0, [])
    assert [(row["kernel"], row["stages"] is None, row["status"]) for row in report.rows] == [
        *[("linear_masked_mse", False, OUT_OF_TIME)] * 2,
        *[("masked_mse", True, OUT_OF_TIME)] * 2,
    ]


def test_a_sweep_that_is_stopped_makes_no_further_problem(sweep, monkeypatch):
    made, make = [], problem

    def note(kernel, size, device):
        made.append(kernel)
        return make(kernel, size, device)

    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(bench_masked_mse, "problem", note)
    monkeypatch.setattr(bench_masked_mse, "as_accurate", stop)
    before = signal.getsignal(signal.SIGTERM)
    try:
        status, report = sweep({"masked_mse": 1000, "linear_masked_mse": 300})
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (status, made) == (1, ["masked_mse"])
    assert [row["status"] for row in report.rows] == [OUT_OF_TIME] * 4


def test_a_sweep_needs_a_gpu(tmp_path, monkeypatch, capsys):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    assert run(parser.parse_args(["--out", str(tmp_path), "--sweep"])) == 2
    assert "needs a GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
