"""Whether memory grows with the number of cases: preparing, reading, training.

    run(arguments)   `python launchers/bench.py memory`

For each number of cases a source is made of one case's folder, linked that often; it is prepared, windows of random
cases are read from the store, and configs/fluid/nano.json is trained on it for some steps, evaluation and checkpoint
included, each by a process of its own. Peaks of resident memory, file-backed pages included, are those that the kernel
notes (VmHWM).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from trunkline.benchmarks.fluid_prepare import write_random_case
from trunkline.engine.errors import ConfigError, DataError

_MOST_GROWTH_MIB = 32
_PREPARE = """
import sys, time
from pathlib import Path
from trunkline.models.fluid.prepare import prepare
start = time.perf_counter()
prepare(Path(sys.argv[1]), Path(sys.argv[2]), workers=int(sys.argv[3]))
print(time.perf_counter() - start)
"""
_READ = """
import random, sys, time
from trunkline.models.fluid.data import FluidWindows, collate
from trunkline.models.fluid.store import Store
windows = FluidWindows(Store.open(sys.argv[1]), "train", history=3)
order = random.Random(0)
start = time.perf_counter()
for _ in range(int(sys.argv[2])):
    collate([windows[order.randrange(len(windows))]])
print(time.perf_counter() - start)
"""

_TRAIN = """
import json, sys, time
from pathlib import Path
from trunkline.engine.backends import choose_backend
from trunkline.engine.config.run_config import load_config
from trunkline.engine.ranks.distributed import start, stop
from trunkline.engine.trainer import Trainer
from trunkline.models.registry import config_sections, make_task
raw = json.loads(Path("configs/fluid/nano.json").read_text())
raw["data"] |= {"store": sys.argv[1], "history": 1}
raw["training"] |= {"epochs": None, "steps": int(sys.argv[2]), "eval_samples": 2, "log_every": 1, "trackers": []}
raw["deepspeed"] |= {"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": False}}
path = Path(sys.argv[1]).parent / "nano.json"
path.write_text(json.dumps(raw))
config = load_config(path, sections=config_sections)
begin = time.perf_counter()
sys.stdout = sys.stderr
backend = choose_backend("auto")
Trainer(make_task(config), config, start(), path.parent / "run", backend=backend).run()
stop()
sys.stdout = sys.__stdout__
print(time.perf_counter() - begin)
"""
_MOST_BESIDE_THE_MODEL_MIB = 4096


def run(arguments: argparse.Namespace) -> int:
    """Measure and print one line for each number of cases; 1 if a peak grew by more than 32 MiB or is past 4 GiB."""
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
        print(f"{'cases':>6} {'prepare':>12} {'s a case':>9} {'windows':>12} {'ms each':>9} {'train':>12} {'s':>6}")
        for count in counts:
            with tempfile.TemporaryDirectory(dir=scratch) as folder:
                peaks.append(_measure(case.resolve(), count, Path(folder), arguments))
    growth = max(max(column) - column[0] for column in zip(*peaks))
    print(f"largest growth from {counts[0]} cases on: {growth:.0f} MiB (limit {_MOST_GROWTH_MIB})")
    return int(growth > _MOST_GROWTH_MIB or max(map(max, peaks)) > _MOST_BESIDE_THE_MODEL_MIB)


def _measure(case: Path, count: int, folder: Path, arguments: argparse.Namespace) -> tuple[float, ...]:
    source, out = folder / "source", folder / "store"
    (source / "train").mkdir(parents=True)
    for number in range(1, count + 1):
        (source / "train" / f"case_{number:04d}").symlink_to(case, target_is_directory=True)
    prepare_mib, prepare_s = peak_of(_PREPARE, str(source), str(out), str(arguments.workers))
    read_mib, read_s = peak_of(_READ, str(out), str(arguments.windows))
    train_mib, train_s = peak_of(_TRAIN, str(out), str(arguments.steps))
    print(
        f"{count:6d} {prepare_mib:8.0f} MiB {prepare_s / count:9.2f} {read_mib:8.0f} MiB "
        f"{read_s / arguments.windows * 1e3:9.2f} {train_mib:8.0f} MiB {train_s:6.1f}",
        flush=True,
    )
    return prepare_mib, read_mib, train_mib


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
    return peak / 2**20, float(printed.splitlines()[-1])


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
