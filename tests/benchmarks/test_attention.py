import argparse
import csv
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trunkline.benchmarks import attention as bench_attention
from trunkline.benchmarks import contenders as bench_contenders
from trunkline.benchmarks.attention import Job, run
from trunkline.benchmarks.contenders import PATTERNS, Attention, Problem, make_problem
from trunkline.benchmarks.flags import attention as add_flags
from trunkline.benchmarks.report import OUT_OF_TIME, Report
from trunkline.kernels.reference import visible_pairs


def arguments(tmp_path, *flags):
    parser = argparse.ArgumentParser()
    add_flags(parser)
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
    def forgets_the_mask(problem: Problem) -> Attention:
        return bench_contenders.slices(problem.block, key_mask=None)

    monkeypatch.setitem(bench_contenders.CONTENDERS, "ours", forgets_the_mask)
    assert run(arguments(tmp_path, "--head-dims", "16")) == 1
    for row in rows_written(tmp_path):
        if row["contender"] == "ours" and "key mask" in row["pattern"]:
            assert row["status"].startswith("wrong: ")
            assert row["tflop_per_s"] == row["median_ms"] == ""


def test_the_forward_rate_survives_a_backward_pass_that_fails(tmp_path, monkeypatch):
    class OnlyForward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("out of shared memory")

    plain = bench_contenders.CONTENDERS["ours"]
    monkeypatch.setitem(
        bench_contenders.CONTENDERS, "ours", lambda problem: lambda *qkv: OnlyForward.apply(plain(problem)(*qkv))
    )
    assert run(arguments(tmp_path, "--head-dims", "16")) == 1
    for row in rows_written(tmp_path):
        if row["contender"] == "ours":
            right = row["direction"] == "forward"
            assert row["status"] == ("ok" if right else "not run: RuntimeError: out of shared memory")
            assert bool(row["tflop_per_s"]) == right


def test_out_of_time_the_table_is_whole_and_says_so(tmp_path):
    assert run(arguments(tmp_path, "--head-dims", "16", "--minutes", "0")) == 0
    rows = rows_written(tmp_path)
    assert len(rows) == 2 * sum(len(contenders) for contenders in PATTERNS.values())
    assert {row["status"] for row in rows} == {OUT_OF_TIME}
    assert {row["tflop_per_s"] for row in rows} == {""}
    assert not list(tmp_path.glob("*/*.png"))


COMPILES_FOR_LONG = """
import sys, time
from trunkline.benchmarks import contenders as bench_contenders
from trunkline.launchers.bench import main

def compile(problem):
    print("compiling", flush=True)
    time.sleep(600)

bench_contenders.CONTENDERS["FlexAttention, compiled"] = compile
sys.exit(main(sys.argv[1:]))
"""


def test_ended_by_sigterm_it_leaves_the_table_and_the_plot_of_what_it_measured(tmp_path):
    command = [sys.executable, "-c", COMPILES_FOR_LONG, "attention", "--quick", "--head-dims", "16", "--heads", "1"]
    bench = subprocess.Popen(
        [*command, "--out", str(tmp_path)], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True
    )
    try:
        assert bench.stdout.readline() == "compiling\n"
        for _ in range(2):  # as `timeout` does
            bench.send_signal(signal.SIGTERM)
        said, _ = bench.communicate(timeout=60)
    finally:
        bench.kill()
    assert bench.returncode == 1
    statuses = {(row["contender"], row["status"]) for row in rows_written(tmp_path)}
    assert {("ours", "ok"), ("FlexAttention, compiled", OUT_OF_TIME)} <= statuses
    assert ("ours", OUT_OF_TIME) not in statuses
    assert "| FlexAttention, compiled | forward |" in said
    assert {path.suffix for path in tmp_path.glob("*/attention.*")} == {".csv", ".md", ".json", ".png"}


def test_what_the_aims_are_about_comes_first(tmp_path):
    report = Report("attention", "", torch.device("cpu"), tmp_path)
    jobs = sorted(bench_attention._jobs(report, [32, 64, 128], [3, 5, 7, 10], 6712), key=Job.priority)
    assert [(job.pattern, job.head_dim, job.tokens // 6712) for job in jobs[:8]] == [
        (pattern, head_dim, count)
        for pattern in ("block-causal + key mask", "full")
        for head_dim in (64, 32)
        for count in (3, 10)
    ]
    order = [job.contender for job in jobs]
    assert order[:36] == ["ours"] * 36
    assert order[36:48] == ["ours, deterministic"] * 12
    others = jobs[48:]
    ends = [job.at_an_end and job.head_dim != 128 for job in others]
    assert ends == sorted(ends, reverse=True)
    first = list(dict.fromkeys(job.contender for job in others))
    assert first == ["cuDNN, slices", "cuDNN", "FlexAttention, compiled", "plain SDPA with a mask"]


def test_rows_stand_in_an_order_to_read_them_in(tmp_path):
    run(arguments(tmp_path, "--head-dims", "16,32", "--minutes", "0"))
    keys = [
        (int(row["head_dim"]), int(row["tokens"]), list(PATTERNS).index(row["pattern"]))
        for row in rows_written(tmp_path)
    ]
    assert keys == sorted(keys)
