"""Whether memory grows with the number of cases: preparing a store, and reading windows out of it.

    add_arguments(parser), run(arguments)   `python launchers/bench.py memory`

For each number of cases a source is made of one case's folder, linked that often; it is prepared, and windows of random
cases are read from the store. Peaks of resident memory, file-backed pages included, are those that the kernel notes
(VmHWM), for the main process and for the largest worker.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from engine.errors import ConfigError, DataError
from models.fluid.bench_prepare import write_random_case

_PREPARE = """
import sys
from pathlib import Path
from models.fluid.prepare import prepare
if __name__ == "__main__":
    prepare(Path(sys.argv[1]), Path(sys.argv[2]), workers=int(sys.argv[3]))
"""
_READ = """
import random, sys
from models.fluid.data import FluidWindows, collate
from models.fluid.store import Store
windows = FluidWindows(Store.open(sys.argv[1]), "train", history=3)
order = random.Random(0)
for _ in range(int(sys.argv[2])):
    collate([windows[order.randrange(len(windows))]])
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/bench.py memory`."""
    parser.add_argument("--case", type=Path, metavar="FOLDER", help="a case's CSV files (default: random, V = 6,712)")
    parser.add_argument("--counts", default="5,20,60", help="numbers of cases (5,20,60)")
    parser.add_argument("--windows", type=int, default=5000, help="windows to read from each store (5000)")
    parser.add_argument("--workers", type=int, default=2, help="processes that prepare (2)")


def run(arguments: argparse.Namespace) -> None:
    """Measure and print one line for each number of cases."""
    try:
        counts = [int(count) for count in arguments.counts.split(",")]
    except ValueError as error:
        raise ConfigError(f"--counts {arguments.counts}: write numbers such as 5,20,60") from error
    if min(counts) < 2:
        raise ConfigError(f"--counts {arguments.counts}: use 2 or more, since one case becomes validation data")
    with tempfile.TemporaryDirectory() as scratch:
        case = arguments.case
        if case is None:
            case = Path(scratch) / "case"
            case.mkdir()
            write_random_case(case, seed=0)
        print(
            f"{'cases':>6} {'prepare: main':>16} {'largest worker':>16} {'seconds':>9} {'windows':>16} {'ms each':>9}"
        )
        for count in counts:
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                _measure(case.resolve(), count, Path(folder), arguments.workers, arguments.windows)


def _measure(case: Path, count: int, folder: Path, workers: int, windows: int) -> None:
    source, out = folder / "source", folder / "store"
    (source / "train").mkdir(parents=True)
    for number in range(1, count + 1):
        (source / "train" / f"case_{number:04d}").symlink_to(case, target_is_directory=True)
    start = time.perf_counter()
    main, worker = _peaks_mib(_PREPARE, str(source), str(out), str(workers))
    prepared = time.perf_counter() - start
    start = time.perf_counter()
    reader, _ = _peaks_mib(_READ, str(out), str(windows))
    each = (time.perf_counter() - start) / windows * 1e3
    print(f"{count:6d} {main:12.0f} MiB {worker:12.0f} MiB {prepared:9.1f} {reader:12.0f} MiB {each:9.2f}", flush=True)


def _peaks_mib(program: str, *arguments: str) -> tuple[float, float]:
    """Peak resident memory of a Python program and of the largest process it started."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(program)
        script.flush()
        process = psutil.Popen([sys.executable, script.name, *arguments], stdout=subprocess.DEVNULL)
        peaks: dict[int, int] = {}
        while process.poll() is None:
            for pid in [process.pid, *(child.pid for child in _children(process))]:
                peaks[pid] = max(peaks.get(pid, 0), _high_water(pid))
            time.sleep(0.02)
    if process.returncode:
        raise DataError(f"the measured program ended with status {process.returncode}; its message stands above")
    main = peaks.pop(process.pid)
    return main / 2**20, max(peaks.values(), default=0) / 2**20


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


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
