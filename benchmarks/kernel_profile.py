"""What limits each kernel: shares of the GPU's peaks, counted by ncu.

    run(arguments)   `python launchers/bench.py profile`
    python -m trunkline.benchmarks.kernel_profile CASE    what ncu watches: a case's kernels, each launched once

Sizes are those of the other benchmarks. Clocks are left alone, and ncu empties the caches before each launch. Of two
counters for one thing the larger counts: which of them sees Hopper's warpgroup products may depend on ncu's version.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trunkline.benchmarks.contenders import V, deterministic, make_problem, ours
from trunkline.benchmarks.masked_mse import AIMED_AT
from trunkline.benchmarks.masked_mse import problem as make_mse_problem
from trunkline.benchmarks.report import OK, OUT_OF_TIME, Deadline, Report, Row, the_device

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CASES = ("attention-64", "attention-32", *AIMED_AT, "attention-64-deterministic", "attention-32-deterministic")
"""Kernel, head dimension, mode; what matters most first."""
OURS = "^_(flash|sort_key_tiles|masked_mse|linear_masked_mse)_"  # the names of their kernels

PEAK = "avg.pct_of_peak_sustained_elapsed"
SHARES = {
    "tensor": ("sm__pipe_tensor_cycles_active", "sm__pipe_tensor_op_hmma_cycles_active"),
    "xu": ("sm__inst_executed_pipe_xu",),  # exponentials
    "fma": ("sm__pipe_fma_cycles_active", "sm__inst_executed_pipe_fma"),
    "alu": ("sm__pipe_alu_cycles_active", "sm__inst_executed_pipe_alu"),
    "issue": ("sm__inst_issued", "sm__issue_active"),
    "l2": ("lts__throughput",),
    "dram": ("gpu__dram_throughput", "dram__throughput"),
}
"""What a kernel may use up -> ncu's counters of it, each in percent of the peak over the kernel's whole time."""
DURATION, REGISTERS = "gpu__time_duration.sum", "launch__registers_per_thread"
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
STALLS = (
    *("barrier", "branch_resolving", "dispatch_stall", "drain", "gmma", "imc_miss", "lg_throttle", "long_scoreboard"),
    *("math_pipe_throttle", "membar", "mio_throttle", "misc", "no_instruction", "not_selected", "short_scoreboard"),
    *("sleeping", "tex_throttle", "wait"),
)
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
METRICS = (
    *(DURATION, REGISTERS, OCCUPANCY),
    *(f"{counter}.{PEAK}" for counters in SHARES.values() for counter in counters),
    *(STALL.format(reason) for reason in STALLS),
)
ROOT = Path(__file__).resolve().parents[1]
IN_TOOLKIT = "/usr/local/cuda/bin/ncu"
MS = {"nsecond": 1e-6, "ns": 1e-6, "usecond": 1e-3, "us": 1e-3, "msecond": 1, "ms": 1, "second": 1e3, "s": 1e3}


class NoCountersError(RuntimeError):
    """ncu may not read this GPU's counters, whatever it watches."""


def run(arguments: argparse.Namespace) -> int:
    """Profile, print and write. Returns the exit status."""
    deadline, device = Deadline(arguments.minutes), the_device()
    places = [arguments.ncu] if arguments.ncu is not None else ["ncu", IN_TOOLKIT]
    ncu = next((found for place in places if (found := shutil.which(place))), None)
    if ncu is None:
        print(
            f"error: no {' and no '.join(places)}: it comes with CUDA's toolkit, in Nsight Compute; --ncu says where "
            "it lies",
            file=sys.stderr,
        )
        return 2
    if device.type != "cuda":
        print("error: profile needs an NVIDIA GPU, and torch sees none here", file=sys.stderr)
        return 2
    report = Report("profile", "What limits the kernels", device, arguments.out)
    try:
        failed = profile(report, CASES[:1] if arguments.quick else CASES, os.path.abspath(ncu), deadline)
    except NoCountersError as error:
        print(
            f"error: {error}\nRun it as root, or let every user read the counters: load the module nvidia with "
            "NVreg_RestrictProfilingToAdminUsers=0. In a container: --cap-add SYS_ADMIN.",
            file=sys.stderr,
        )
        return 2
    return max(report.write(_draw), failed)


def profile(report: Report, cases: tuple[str, ...], ncu: str, deadline: Deadline) -> bool:
    """Fill the report. Returns whether a case failed; raises NoCountersError if none can succeed."""
    report.notes.append(
        f"Attention: one sample of {3 * V:,} tokens, 8 heads, bf16, block-causal with a key mask. masked_mse: "
        f"{AIMED_AT['masked_mse']:,} values. linear_masked_mse: {AIMED_AT['linear_masked_mse']:,} rows."
    )
    report.notes.append(
        "In percent of the peak over the kernel's time: the pipes for matrices (tensor), exponentials (xu), "
        "multiply-adds (fma) and other arithmetic (alu); slots to issue in; L2; memory. "
        "Occupancy is of a multiprocessor's warps. Stalls are shares of the time that warps wait."
    )
    waiting = {case: report.add(case=case, **_figures({}), status=OUT_OF_TIME) for case in cases}

    def fill_in(case: str) -> None:
        try:
            launches = watch(case, ncu)
            rows = [{"case": case, **_figures(launch), "status": OK} for launch in launches]
        except (RuntimeError, OSError) as error:
            if isinstance(error, NoCountersError):
                raise
            rows = [waiting[case] | {"status": f"not run: {error}"}]
        at = report.rows.index(waiting[case])
        report.rows[at : at + 1] = rows

    report.measure(cases, fill_in, deadline)
    return any(row["status"] not in (OK, OUT_OF_TIME) for row in report.rows)


def _figures(launch: dict[str, str]) -> Row:
    """What a row says of a launch; None where ncu gave no number."""
    shares = {
        name: max(
            (x for counter in counters if (x := number(launch.get(f"{counter}.{PEAK}"))) is not None), default=None
        )
        for name, counters in SHARES.items()
    }
    known = {name: share for name, share in shares.items() if share is not None}
    stalls = {reason: number(launch.get(STALL.format(reason))) or 0.0 for reason in STALLS}
    all_stalls = sum(stalls.values())
    worst = sorted(stalls, key=lambda reason: -stalls[reason])[:3] if all_stalls else []
    return {
        "kernel": launch.get("Kernel Name"),
        "duration_ms": number(launch.get(DURATION)),
        **{f"{name}_pct": share for name, share in shares.items()},
        "limited_by": max(known, key=lambda name: known[name], default=None),
        "occupancy_pct": number(launch.get(OCCUPANCY)),
        "registers": number(launch.get(REGISTERS)),
        "stalls": ", ".join(f"{reason} {stalls[reason] / all_stalls:.0%}" for reason in worst) or None,
    }


def number(text: str | None) -> float | None:
    """Of a cell: "1,234.5" -> 1234.5, "n/a" -> None."""
    try:
        value = float((text or "").replace(",", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def watch(case: str, ncu: str, metrics: tuple[str, ...] = METRICS) -> list[dict[str, str]]:
    """Run a case under ncu: of each launch of a kernel of ours, its name and its metrics.

    Raises NoCountersError, or RuntimeError with what ncu and the case said, also where only some launches were seen.
    """
    with tempfile.TemporaryDirectory() as folder:
        found, output = Path(folder, "found.ncu-rep"), Path(folder, "output.txt")
        command = [ncu, "--export", str(found), "--metrics", ",".join(metrics)]
        command += ["--kernel-name", f"regex:{OURS}", "--profile-from-start", "off"]
        command += ["--clock-control", "none", "--target-processes", "all"]
        command += [sys.executable, "-m", "trunkline.benchmarks.kernel_profile", case]
        with output.open("w") as file:
            child = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        try:
            child.wait()
        finally:
            if child.poll() is None:  # SIGTERM came, or ctrl-c
                os.killpg(child.pid, signal.SIGKILL)  # the case too, which would hold the GPU
                child.wait()
        said, launches = output.read_text(errors="replace").splitlines(), []
        if found.exists():
            command = [ncu, "--import", str(found), "--csv", "--page", "raw"]
            command += ["--print-units", "base", "--print-kernel-base", "function"]
            page = subprocess.run(command, capture_output=True, text=True, check=False)
            launches, said = read_raw_page(page.stdout), said + page.stderr.splitlines()
    if launches and child.returncode == 0:
        return launches
    complaints = [line for line in said if line.startswith(("==ERROR==", "==WARNING=="))]
    for line in complaints:
        if "ERR_NVGPUCTRPERM" in line:
            raise NoCountersError(line)
    known = tuple(metric for metric in metrics if not any(metric.split(".")[0] in line for line in complaints))
    if 0 < len(known) < len(metrics):  # names come and go with ncu's version
        return watch(case, ncu, known)
    last = [line for line in said if line.strip() and not line.startswith("==")][-1:]
    raise RuntimeError("; ".join([*complaints, *last]) or f"{ncu} ended with status {child.returncode} and no word")


def read_raw_page(text: str) -> list[dict[str, str]]:
    """The launches on ncu's raw page, CSV with a row of names, one of units, then one a launch; durations in ms."""
    lines = text.splitlines()
    while lines and not lines[0].startswith('"ID",'):
        del lines[0]
    if not lines:
        return []
    names, units, *launches = csv.reader(lines)
    rows = [dict(zip(names, cells)) for cells in launches if len(cells) == len(names)]
    in_ms = MS.get(dict(zip(names, units)).get(DURATION, ""), math.nan)
    for row in rows:
        row[DURATION] = str((number(row.get(DURATION)) or math.nan) * in_ms)
    return rows


def launch(case: str, device: torch.device, shrink: int = 1) -> None:
    """Run a case's passes, twice to compile and warm up and once for ncu to see; at 1 / `shrink` of its size."""
    kernel, *rest = case.split("-")
    forward: Callable[[], Tensor]
    if kernel == "attention":
        problem = make_problem(3 * (V // shrink), int(rest[0]), 8, V // shrink, True, True, device)
        forward, leaves = partial(ours(problem), *problem.leaves), problem.leaves
    else:
        call, _, inputs, mask = make_mse_problem(kernel, AIMED_AT[kernel] // shrink, device)
        forward, leaves = lambda: call(*inputs, mask)[0], [x for x in inputs if x.requires_grad]
    only_backward = "deterministic" in rest  # the forward pass is the same as without
    with deterministic(only_backward):
        for seen in (False, False, True):
            with _seen_by_ncu(device, seen and not only_backward):
                out = forward()
            upstream = torch.randn_like(out)
            with _seen_by_ncu(device, seen):
                torch.autograd.grad(out, leaves, upstream)


@contextmanager
def _seen_by_ncu(device: torch.device, seen: bool) -> Iterator[None]:
    if not seen or device.type == "cpu":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.profiler.start()
    yield
    torch.cuda.synchronize(device)
    torch.cuda.profiler.stop()


def _draw(rows: list[Row]) -> Figure:
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 1 + 0.9 * len(rows)), layout="constrained")
    thickness = 0.8 / len(SHARES)
    for at, name in enumerate(SHARES):
        shares = [row[f"{name}_pct"] or 0 for row in rows]
        axis.barh([y + at * thickness for y in range(len(rows))], shares, thickness, label=name)
    axis.set_yticks(
        [y + 0.4 for y in range(len(rows))], [f"{row['case']}\n{row['kernel']}" for row in rows], fontsize=7
    )
    axis.invert_yaxis()
    axis.set(xlabel="% of the peak", xlim=(0, 100))
    axis.legend(fontsize=7)
    return figure


if __name__ == "__main__":
    launch(sys.argv[1], torch.device("cuda"))
