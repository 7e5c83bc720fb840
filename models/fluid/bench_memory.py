"""Whether memory grows with the number of cases: preparing a store, and reading windows out of it.

    add_arguments(parser), run(arguments)   `python launchers/bench.py memory`

For each number of cases a source is made of one case's folder, linked that often; it is prepared, and windows of random
cases are read from the store, each by a process of its own. Peaks of resident memory, file-backed pages included, are
those that the kernel notes (VmHWM).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from engine.errors import ConfigError, DataError
from models.fluid.bench_prepare import write_random_case

_MOST_GROWTH_MIB = 32
_PREPARE = """
import sys, time
from pathlib import Path
from models.fluid.prepare import prepare
start = time.perf_counter()
prepare(Path(sys.argv[1]), Path(sys.argv[2]), workers=int(sys.argv[3]))
print(time.perf_counter() - start)
"""
_READ = """
import random, sys, time
from models.fluid.data import FluidWindows, collate
from models.fluid.store import Store
windows = FluidWindows(Store.open(sys.argv[1]), "train", history=3)
order = random.Random(0)
start = time.perf_counter()
for _ in range(int(sys.argv[2])):
    collate([windows[order.randrange(len(windows))]])
print(time.perf_counter() - start)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/bench.py memory`."""
    parser.add_argument("--case", type=Path, metavar="FOLDER", help="a case's CSV files (default: random, V = 6,712)")
    parser.add_argument("--counts", default="5,20,60", help="numbers of cases (5,20,60)")
    parser.add_argument("--windows", type=int, default=5000, help="windows to read from each store (5000)")
    parser.add_argument("--workers", type=int, default=2, help="cases prepared at a time (2)")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print one line for each number of cases; 1 if a peak grew by more than 32 MiB, else 0."""
    try:
        counts = [int(count) for count in arguments.counts.split(",")]
    except ValueError as error:
        raise ConfigError(f"--counts {arguments.counts}: write numbers such as 5,20,60") from error
    if min(counts) < 2:
        raise ConfigError(f"--counts {arguments.counts}: use 2 or more, since one case becomes validation data")
    if min(arguments.windows, arguments.workers) < 1:
        raise ConfigError("--windows and --workers must be 1 or more")
    peaks = []
    with tempfile.TemporaryDirectory() as scratch:
        case = arguments.case
        if case is None:
            case = Path(scratch) / "case"
            case.mkdir()
            write_random_case(case, seed=0)
        print(f"{'cases':>6} {'prepare':>12} {'s a case':>9} {'windows':>12} {'ms each':>9}")
        for count in counts:
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                peaks.append(_measure(case.resolve(), count, Path(folder), arguments.workers, arguments.windows))
    growth = max(max(column) - column[0] for column in zip(*peaks))
    print(f"largest growth from {counts[0]} cases on: {growth:.0f} MiB (limit {_MOST_GROWTH_MIB})")
    return int(growth > _MOST_GROWTH_MIB)


def _measure(case: Path, count: int, folder: Path, workers: int, windows: int) -> tuple[float, float]:
    source, out = folder / "source", folder / "store"
    (source / "train").mkdir(parents=True)
    for number in range(1, count + 1):
        (source / "train" / f"case_{number:04d}").symlink_to(case, target_is_directory=True)
    prepare_mib, prepare_s = peak_of(_PREPARE, str(source), str(out), str(workers))
    read_mib, read_s = peak_of(_READ, str(out), str(windows))
    print(
        f"{count:6d} {prepare_mib:8.0f} MiB {prepare_s / count:9.2f} {read_mib:8.0f} MiB {read_s / windows * 1e3:9.2f}",
        flush=True,
    )
    return prepare_mib, read_mib


def peak_of(program: str, *arguments: str) -> tuple[float, float]:
    """Peak resident memory, in MiB, of a Python program run by itself; the number that it prints."""
    process = subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _high_water(process.pid))
        time.sleep(0.02)
    printed, _ = process.communicate()
    if process.returncode:
        raise DataError(f"the measured program ended with status {process.returncode}; its message stands above")
    return peak / 2**20, float(printed)


def _high_water(pid: int) -> int:
    """Bytes of VmHWM; 0 for a process that has gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
