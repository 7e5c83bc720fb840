"""What the kernels' benchmarks share: how a call is timed and checked, and how the figures are written.

Report collects rows and writes <name>.csv, .md, .json and .png; median_seconds times a call; as_accurate says whether a
rate may be shown at all.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.triton_path import triton

Row = dict[str, Any]
Draw = Callable[[list[Row], str, Path], None]  # of the right rows, the device's name and the file
OK = "ok"


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that both benchmarks have."""
    parser.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("runs/benchmarks"), help="files go to DIR/<device>"
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes, fewer runs")


def the_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """Such as "NVIDIA H200"; of a CPU the architecture and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def integers(text: str) -> list[int]:
    """An argparse type: "32,64" -> [32, 64]."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers such as 32,64")
    return [int(part) for part in text.split(",")]


def median_seconds(call: Callable[[], object], device: torch.device, budget_s: float) -> float:
    """The median time of `call`, run again and again for about `budget_s` seconds, and at least three times.

    On a GPU by events, with the L2 cache overwritten before each run.
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

    def __post_init__(self) -> None:
        if self.device.type == "cpu":
            self.notes.append("These are rates of a CPU, on torch's own operators. They say nothing about a GPU.")

    def add(self, **row: Any) -> None:
        """One row, also where something was not run: its status then says why."""
        self.rows.append(row)

    @property
    def red(self) -> list[Row]:
        """The rows whose result was wrong."""
        return [row for row in self.rows if row["status"].startswith("wrong")]

    def write(self, draw: Draw) -> int:
        """Print the table and write all files. Returns the exit status: 1 if a result was wrong."""
        print(self._markdown())
        print(f"written to {self.save(draw)}: {self.name}.csv, .md, .json, .png")
        return 1 if self.red else 0

    def save(self, draw: Draw) -> Path:
        """Write all files, also of a part of the rows, in case the rest never comes. Returns their folder."""
        slug = re.sub(r"[^a-z0-9]+", "-", device_name(self.device).lower()).strip("-")
        folder = self.out / slug
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.md").write_text(self._markdown())
        with (folder / f"{self.name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
        described = environment(self.device) | {"benchmark": self.name, "notes": self.notes, "rows": self.rows}
        (folder / f"{self.name}.json").write_text(json.dumps(described, indent=1) + "\n")
        if right := [row for row in self.rows if row["status"] == OK]:
            draw(right, device_name(self.device), folder / f"{self.name}.png")
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
        lines += ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
        lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"


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
