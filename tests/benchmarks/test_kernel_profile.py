"""ncu's part is played by a script that prints what a real one did; the kernels run through Triton's interpreter."""

import argparse
import json
import os
import re
import signal
import sys

import pytest
import torch

from trunkline.benchmarks import kernel_profile as bench_profile
from trunkline.benchmarks.flags import profile as add_flags
from trunkline.benchmarks.kernel_profile import (
    CASES,
    METRICS,
    OURS,
    NoCountersError,
    launch,
    number,
    profile,
    run,
)
from trunkline.benchmarks.report import OK, OUT_OF_TIME, Deadline, Report

# The shape of a page of ncu: rows of names and of units, then launches; numbers are quoted, some with commas.
NAMES = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream"]
FORWARD = {
    "gpu__time_duration.sum": ("nsecond", "1,234,500"),
    "launch__registers_per_thread": ("register/thread", "128"),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("%", "24.6"),
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": ("%", "61.25"),
    "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_elapsed": ("%", "n/a"),
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_elapsed": ("%", "72.5"),
    "sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_elapsed": ("%", "nan"),
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": ("%", "30.01"),
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio": ("inst", "1"),
    "smsp__average_warps_issue_stalled_gmma_per_issue_active.ratio": ("inst", "6"),
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": ("inst", "2"),
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": ("inst", "1.00"),
    "smsp__average_warps_issue_stalled_membar_per_issue_active.ratio": ("inst", "0"),
}


def page(*kernels, metrics=FORWARD):
    quote = lambda cells: ",".join(f'"{cell}"' for cell in cells)  # noqa: E731
    lines = [quote([*NAMES, *metrics]), quote([""] * len(NAMES) + [unit for unit, _ in metrics.values()])]
    for at, kernel in enumerate(kernels):
        cells = [at, 77, "python3.12", "127.0.0.1", kernel, 1, 7]
        lines.append(quote([*cells, *(value for _, value in metrics.values())]))
    return "\n".join(lines) + "\n"


@pytest.fixture
def ncu(tmp_path):
    """Makes a program that behaves like ncu: notes how it was called, leaves a report, and prints a page of it."""

    def make(text, says="==PROF== Connected to process 77", unknown="", status=0, first=""):
        path = tmp_path / "ncu"
        path.write_text(
            f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time
arguments = sys.argv[1:]
with open({str(tmp_path / "calls")!r}, "a") as file:
    file.write(json.dumps(arguments) + "\\n")
{first}
if "--import" in arguments:
    print({text!r})
elif {unknown!r} and {unknown!r} in " ".join(arguments):
    print("==ERROR== Failed to find metric " + {unknown!r})
else:
    print({says!r})
    if {text!r}:
        pathlib.Path(arguments[arguments.index("--export") + 1]).touch()
sys.exit({status})
"""
        )
        path.chmod(0o755)
        return str(path)

    return make


def calls(tmp_path):
    return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


def profiled(tmp_path, program, cases=CASES[:1], minutes=None):
    report = Report("profile", "A profile", torch.device("cpu"), tmp_path / "out")
    failed = profile(report, cases, program, Deadline(minutes))
    return report, failed


def test_a_launch_becomes_a_row_of_shares_and_what_limits_it(tmp_path, ncu):
    report, failed = profiled(tmp_path, ncu(page("_flash_fwd_kernel", "_flash_bwd_kernel")))
    assert not failed
    first, second = report.rows
    assert (first["case"], first["kernel"], second["kernel"]) == (CASES[0], "_flash_fwd_kernel", "_flash_bwd_kernel")
    assert first["duration_ms"] == pytest.approx(1.2345)
    assert (first["registers"], first["occupancy_pct"]) == (128, 24.6)
    assert (first["tensor_pct"], first["xu_pct"], first["l2_pct"]) == (61.25, 72.5, 30.01)
    assert first["fma_pct"] is first["alu_pct"] is first["dram_pct"] is None
    assert first["limited_by"] == "xu"
    assert first["stalls"] == "gmma 60%, long_scoreboard 20%, barrier 10%"
    assert first["status"] == OK
    assert report.write(bench_profile._draw) == 0
    assert {path.suffix for path in tmp_path.glob("out/*/profile.*")} == {".csv", ".md", ".json", ".png"}


def test_ncu_is_told_what_to_watch(tmp_path, ncu):
    profiled(tmp_path, ncu(page("_flash_fwd_kernel")))
    watching, reading = calls(tmp_path)
    assert watching[-4:] == [sys.executable, "-m", "trunkline.benchmarks.kernel_profile", CASES[0]]
    options = dict(zip(watching[:-4:2], watching[1:-4:2], strict=True))
    assert options["--metrics"].split(",") == list(METRICS)
    assert options["--clock-control"] == "none"
    assert options["--profile-from-start"] == "off"
    assert options["--kernel-name"] == f"regex:{OURS}"
    assert reading[:2] == ["--import", options["--export"]]
    assert reading[2:5] == ["--csv", "--page", "raw"]


def test_a_metric_that_this_ncu_does_not_know_is_left_out(tmp_path, ncu):
    gmma = "smsp__average_warps_issue_stalled_gmma_per_issue_active"
    report, failed = profiled(tmp_path, ncu(page("_flash_fwd_kernel"), unknown=gmma))
    assert not failed
    assert report.rows[0]["status"] == OK
    asked = [set(call[call.index("--metrics") + 1].split(",")) for call in calls(tmp_path) if "--metrics" in call]
    assert [set(METRICS) - metrics for metrics in asked] == [set(), {f"{gmma}.ratio"}]


def test_a_page_without_any_number_makes_empty_cells(tmp_path, ncu):
    report, _ = profiled(tmp_path, ncu(page("_flash_fwd_kernel", metrics=dict.fromkeys(FORWARD, ("", "n/a")))))
    (row,) = report.rows
    assert row["kernel"] == "_flash_fwd_kernel"
    assert {value for key, value in row.items() if key not in ("case", "kernel", "status")} == {None}


def test_one_case_that_fails_stops_no_other(tmp_path, ncu):
    report, failed = profiled(tmp_path, ncu("", says="RuntimeError: an illegal access", status=1), CASES[:2])
    assert failed
    assert [row["case"] for row in report.rows] == list(CASES[:2])
    assert {row["status"] for row in report.rows} == {"not run: RuntimeError: an illegal access"}
    assert json.loads(next(tmp_path.glob("out/*/profile.json")).read_text())["rows"] == report.rows


def test_a_case_that_dies_after_a_launch_has_failed(tmp_path, ncu):
    program = ncu(page("_flash_fwd_kernel"), says="RuntimeError: an illegal access", status=1)
    report, failed = profiled(tmp_path, program)
    assert failed
    (row,) = report.rows
    assert (row["kernel"], row["status"]) == (None, "not run: RuntimeError: an illegal access")


def test_without_permission_nothing_else_is_tried(tmp_path, ncu):
    says = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters"
    with pytest.raises(NoCountersError, match="ERR_NVGPUCTRPERM"):
        profiled(tmp_path, ncu("", says=says), CASES[:2])
    assert len(calls(tmp_path)) == 1


def test_what_there_is_no_time_for_says_so(tmp_path, ncu):
    report, failed = profiled(tmp_path, ncu(page("_flash_fwd_kernel")), CASES[:2], minutes=0)
    assert not failed
    assert [row["status"] for row in report.rows] == [OUT_OF_TIME] * 2


def test_what_has_begun_in_time_is_finished(tmp_path, ncu):
    program = ncu(page("_flash_fwd_kernel"), first="time.sleep(1)")
    report, failed = profiled(tmp_path, program, CASES[:2], minutes=0.01)
    assert not failed
    assert [row["status"] for row in report.rows] == [OK, OUT_OF_TIME]


def test_sigterm_kills_ncu_and_leaves_what_was_measured(tmp_path, ncu):
    before = signal.getsignal(signal.SIGTERM)
    note = f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))"
    program = ncu("", first=f"{note}; os.kill(os.getppid(), signal.SIGTERM); time.sleep(600)")
    try:
        report, failed = profiled(tmp_path, program, CASES[:2])
        assert report.write(bench_profile._draw) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not failed
    assert [row["status"] for row in report.rows] == [OUT_OF_TIME] * 2
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_numbers_are_read_and_other_cells_have_none():
    assert number("1,234.5") == 1234.5
    assert [number(text) for text in (None, "", "n/a", "nan", "inf")] == [None] * 5


@pytest.mark.parametrize(
    ("flags", "on_the_path", "in_toolkit", "missing"),
    [
        ([], False, False, "no ncu and no "),
        ([], True, False, "GPU"),
        ([], False, True, "GPU"),
        (["--ncu", "no-such-program"], True, True, "no no-such-program:"),
    ],
)
def test_what_is_missing_is_said_in_a_line(tmp_path, ncu, capsys, monkeypatch, flags, on_the_path, in_toolkit, missing):
    ncu("")
    monkeypatch.setenv("PATH", str(tmp_path if on_the_path else tmp_path / "empty"))
    monkeypatch.setattr(bench_profile, "IN_TOOLKIT", str(tmp_path / "ncu" if in_toolkit else tmp_path / "empty"))
    monkeypatch.setattr(bench_profile, "the_device", lambda: torch.device("cpu"))
    parser = argparse.ArgumentParser()
    add_flags(parser)
    assert run(parser.parse_args(["--out", str(tmp_path / "out"), *flags])) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert missing in line


@pytest.mark.parametrize("case", CASES)
def test_every_case_launches_kernels_that_ncu_is_told_to_watch(interpreter, monkeypatch, case):
    from triton.runtime.interpreter import GridExecutor

    launched, execute = set(), GridExecutor.__call__

    def note(self, *args, **kwargs):
        launched.add(self.fn.__name__)
        return execute(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", note)
    launch(case, torch.device("cpu"), shrink=1000 if "attention" in case else 2**18)
    watched = {name for name in launched if re.search(OURS, name)}
    assert watched >= {f"_{'flash' if 'attention' in case else case}_{which}_kernel" for which in ("fwd", "bwd")}
    assert ("_sort_key_tiles_kernel" in watched) == ("attention" in case)
    assert ("_flash_bwd_dq_kernel" in watched) == ("deterministic" in case)
