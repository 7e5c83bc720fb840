"""How the kernels' benchmarks time, check, stop and write their figures.

Report collects rows and writes <name>.csv, .md, .json and .png; median_seconds times a call; as_accurate says whether a
rate may be shown at all; Deadline says whether there is time to start another.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from trunkline.engine.record.tables import markdown
from trunkline.kernels.triton_path import triton

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
J = TypeVar("J")
Draw = Callable[[list[Row]], "Figure"]  # of the right rows
OK = "ok"
OUT_OF_TIME = "not run: out of time"  # of every row until its turn comes, so that a run cut short says the truth
GPU_LOST = "not run: the GPU failed in an earlier one"


def the_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """Such as "NVIDIA H200"; of a CPU the architecture and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


class Stopped(BaseException):
    """SIGTERM came. No Exception, so that nothing on the way takes it for a failure of what is measured."""


class Deadline:
    """The end of the time that a benchmark may take; None is never. What has begun by then is finished."""

    def __init__(self, minutes: float | None) -> None:
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def seconds_left(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def passed(self) -> bool:
        return self.seconds_left() == 0


def median_seconds(call: Callable[[], object], device: torch.device, budget_s: float) -> float:
    """The median time of `call`, run again and again for about `budget_s` seconds.

    On a CPU at least three times, after one that is not timed. On a GPU by events, with the L2 cache overwritten before
    each run, and at least once: do_bench runs the call at least seven times before it times any.
    """
    if device.type == "cuda":
        ms: float = triton.testing.do_bench(call, warmup=budget_s * 250, rep=budget_s * 1000, return_mode="median")
        return ms * 1e-3
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget_s:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def matmul_flops(device: torch.device) -> float:
    """FLOP/s of a large product of random matrices, in bf16 on a GPU."""
    size = 8192 if device.type == "cuda" else 512
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, device, 0.2)


def as_accurate(ours: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor]) -> str:
    """Whether no result is, by its norm, over twice as far from the fp32 one as plain torch in the same dtype.

    "ok", or what is wrong.
    """
    for index, (x, usual, true) in enumerate(zip(ours, plain, truth, strict=True)):
        error, allowed = (x.float() - true).norm(), 2 * (usual.float() - true).norm() + 1e-5 * true.norm()
        if not error <= allowed:  # a NaN is not
            return f"wrong: result {index} is off by {error:.3g}, allowed are {allowed:.3g}"
    return OK


@dataclass
class Report:
    """Rows of one benchmark, with equal keys; those whose "status" is not "ok" carry no rate.

    `out` is the folder in which each device has one of its own.
    """

    name: str
    title: str
    device: torch.device
    out: Path
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stopped: bool = False

    def __post_init__(self) -> None:
        if self.device.type == "cpu":
            self.notes.append("These are rates of a CPU, on torch's own operators. They say nothing about a GPU.")

    def add(self, **row: Any) -> Row:
        """One row, also where something was not run: its status then says why. It may be filled in later."""
        self.rows.append(row)
        return row

    @property
    def red(self) -> list[Row]:
        """The rows whose result was wrong, and those of our own that could not run."""
        return [
            row
            for row in self.rows
            if row["status"].startswith("wrong")
            or (row["status"] not in (OK, OUT_OF_TIME) and str(row.get("contender", "")).startswith("ours"))
        ]

    def measure(self, jobs: Iterable[J], fill_in: Callable[[J], None], deadline: Deadline) -> None:
        """Take the jobs one by one, each with its rows, and save after each, as long as there is time and a GPU.

        SIGTERM ends the job at work, whose rows stay as they are; a row has to be filled in in one step.
        """
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN if self.stopped else self._stop)
        try:
            for job in tqdm(list(jobs), desc=self.name, leave=False):
                if deadline.passed() or self.stopped:
                    return
                fill_in(job)
                self.save()
                if _lost(self.device):
                    for row in self.rows:
                        row["status"] = GPU_LOST if row["status"] == OUT_OF_TIME else row["status"]
                    return
        except Stopped:
            return
        finally:
            if not self.stopped:
                signal.signal(signal.SIGTERM, before)

    def _stop(self, *_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # for good: `timeout` sends it twice, and only writing is left
        self.stopped = True
        raise Stopped

    def write(self, draw: Draw | None = None) -> int:
        """Print the table and write all files. Returns the exit status: 1 if there are red rows, or SIGTERM came."""
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(self._markdown(), flush=True)
        folder = self.save()
        if draw and (right := [row for row in self.rows if row["status"] == OK]):
            import matplotlib.pyplot as plt

            figure = draw(right)
            figure.suptitle(device_name(self.device))
            figure.savefig(folder / f"{self.name}.png", dpi=120)
            plt.close(figure)
        print(f"written to {folder}: {self.name}.csv, .md, .json" + (", .png" if draw and right else ""), flush=True)
        if not self.stopped:
            signal.signal(signal.SIGTERM, before)
        return 1 if self.red or self.stopped else 0

    def save(self) -> Path:
        """Write all files but the plot, which takes seconds; for after every step. Returns their folder."""
        slug = re.sub(r"[^a-z0-9]+", "-", device_name(self.device).lower()).strip("-")
        folder = self.out / slug
        folder.mkdir(parents=True, exist_ok=True)
        table = io.StringIO()
        writer = csv.DictWriter(table, list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        described = environment(self.device) | {"benchmark": self.name, "notes": self.notes, "rows": self.rows}
        written = {".md": self._markdown(), ".csv": table.getvalue(), ".json": json.dumps(described, indent=1) + "\n"}
        for suffix, text in written.items():
            part = folder / f"{self.name}{suffix}.part"
            part.write_text(text)
            part.replace(folder / f"{self.name}{suffix}")  # whole at any moment, also if this process is killed
        return folder

    def _markdown(self) -> str:
        about = environment(self.device)
        lines = [
            f"# {self.title}",
            "",
            f"{about['device']}, {about['versions']}, {about['date']}: `{about['command']}`",
        ]
        lines += [f"\n{note}" for note in self.notes] + [""]
        columns = list(self.rows[0])
        table = [columns, *([_cell(row[column]) for column in columns] for row in self.rows)]
        return "\n".join(lines) + f"\n{markdown(table)}\n"


def _lost(device: torch.device) -> bool:
    """Whether a kernel has ended this process's work on its GPU, as an illegal access to memory does."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def environment(device: torch.device) -> dict[str, str]:
    """Where and with what a figure was measured."""
    versions = {"Python": platform.python_version(), "torch": torch.__version__}
    if triton is not None:
        versions["Triton"] = triton.__version__
    if device.type == "cuda":
        versions |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version())}
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": device_name(device),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python", *sys.argv]),
        "commit": head.stdout.strip() or "unknown",
    }


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def first_line(error: Exception) -> str:
    """An error in one short line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
