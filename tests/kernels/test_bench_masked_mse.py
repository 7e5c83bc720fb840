import argparse
import csv

import torch

from kernels import bench_masked_mse
from kernels.bench_masked_mse import add_arguments, bytes_to_move, problem, run


def run_small(tmp_path, monkeypatch):
    """Run it where there is no compiler: those of torch.compile are not run, and say so."""

    def no_compiler(*_, **__):
        def call(*_):
            raise RuntimeError("no compiler here\nand more lines")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    status = run(parser.parse_args(["--out", str(tmp_path), "--quick", "--values", "500,1000", "--rows", "64"]))
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
    _, _, inputs, mask = problem("linear_masked_mse", 10, torch.device("cpu"))
    once = 2 * (10 * 384 + 384 + 1)
    assert bytes_to_move(inputs, mask) == {"forward": once + 10 * 5, "backward": 2 * once + 10 * 5}
