import argparse
import csv

import pytest
import torch

from kernels import bench_attention
from kernels.bench_attention import Problem, add_arguments, make_problem, run
from kernels.reference import visible_pairs


def arguments(tmp_path, *flags):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["--out", str(tmp_path), "--quick", "--heads", "2", *flags])


def rows_written(tmp_path):
    (path,) = tmp_path.glob("*/attention.csv")
    return list(csv.DictReader(path.open()))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("blocked", [False, True])
def test_useful_flops_count_the_visible_pairs(masked, blocked):
    for tokens in (63, 60, 7):
        problem = make_problem(tokens, 16, 3, 21, masked, blocked, torch.device("cpu"))
        pairs = visible_pairs(tokens, tokens, problem.block, problem.key_mask)
        assert problem.visible == 3 * pairs.sum()


def test_every_contender_has_a_rate_or_a_reason(tmp_path):
    assert run(arguments(tmp_path, "--head-dims", "16")) == 0
    rows = rows_written(tmp_path)
    names = {
        "ours",
        "ours, deterministic",
        "FlexAttention, compiled",
        "plain SDPA with a mask",
        "cuDNN",
        "cuDNN, slices",
    }
    assert {row["contender"] for row in rows} == names
    for row in rows:
        assert bool(row["tflop_per_s"]) == (row["status"] == "ok")
        assert row["status"] == "ok" or row["status"].startswith("not run: ")
        assert row["status"] == "ok" or not row["contender"].startswith("ours")
        assert row["peak_mib"] == ""
    assert {path.suffix for path in tmp_path.glob("*/attention.*")} == {".csv", ".md", ".json", ".png"}


def test_a_wrong_attention_shows_no_rate(tmp_path, monkeypatch):
    def forgets_the_mask(problem: Problem) -> bench_attention.Attention:
        return bench_attention._slices(problem._replace(key_mask=None))

    monkeypatch.setattr(bench_attention, "_ours", forgets_the_mask)
    assert run(arguments(tmp_path, "--head-dims", "16")) == 1
    for row in rows_written(tmp_path):
        if row["contender"].startswith("ours") and "key mask" in row["pattern"]:
            assert row["status"].startswith("wrong: ")
            assert row["tflop_per_s"] == row["median_ms"] == ""


def test_reached_rates_stand_beside_the_aims():
    row = {"direction": "forward", "head_dim": 64, "contender": "ours", "status": "ok"}
    rows = [row | {"pattern": p, "tflop_per_s": r} for p, r in (("block-causal + key mask", 441.4), ("full", 450.0))]
    rows.append(rows[0] | {"tflop_per_s": None, "status": "wrong: result 0"})
    (table,) = bench_attention._aims(rows)
    assert "| forward | 64 | 450 | 500 | 441 | 98% |" in table
    assert "| backward | 32 | 300 | 380 | nothing right |  |" in table
