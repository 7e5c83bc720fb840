"""How long a save delays training, in the background and blocking.

    python launchers/bench.py save --config configs/fluid/demo.json
    torchrun --nproc_per_node 2 launchers/bench.py save --config configs/fluid/demo.json --backend fsdp

The stall is the time that the training loop spends in a save. What the writing takes from the steps beside it, on a
machine whose cores are all busy, shows in the whole: the save and the steps up to the next one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from trunkline.engine.backends import choose_backend
from trunkline.engine.config.run_config import load_config
from trunkline.engine.ranks.distributed import from_main, start, stop
from trunkline.engine.trainer import Trainer
from trunkline.models.registry import config_sections, make_task

LIMIT = 0.25
"""The largest share of a blocking save's stall that a save in the background may take."""
_STEPS_BETWEEN = 10


def run(arguments: argparse.Namespace) -> int:
    """Measure and print. Returns the exit status: 1 if the limit is missed."""
    steps = _STEPS_BETWEEN * (2 * arguments.saves + 2)
    never = steps + 1
    settings = {"steps": steps, "save_every": _STEPS_BETWEEN, "eval_every": never, "keep_last": 2, "trackers": "[]"}
    config = load_config(
        arguments.config, sections=config_sections, settings=[f"training.{k}={v}" for k, v in settings.items()]
    )
    backend, ranks = choose_backend(arguments.backend), start()
    # not in /tmp, which may be memory
    folder = Path(from_main(tempfile.mkdtemp(dir=".") if ranks.is_main else "", ranks))
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            trainer = _Timed(make_task(config), config, ranks, folder / "run", backend=backend)
            trainer.run()
        # of the two that are kept
        size = sum(f.stat().st_size for f in (folder / "run/checkpoints").glob("step-*/**/*") if f.is_file()) / 2
    finally:
        stop()
        if ranks.is_main:
            shutil.rmtree(folder)
    blocking, background = (trainer.median(in_background) for in_background in (False, True))
    share = background[0] / blocking[0]
    if ranks.is_main:
        print(f"{arguments.config}, {backend}, {ranks.world_size} ranks, {size / 2**20:.1f} MiB a checkpoint")
        print(f"{'':12}{'stall':>10}{f'save and {_STEPS_BETWEEN} steps':>22}   (medians of {arguments.saves})")
        for name, (stall, whole) in (("blocking", blocking), ("background", background)):
            print(f"{name:12}{stall * 1e3:>7.1f} ms{whole * 1e3:>19.1f} ms")
        print(f"the stall is {share:.2f} of a blocking save's (limit {LIMIT})")
    return 0 if share <= LIMIT else 1


class _Timed(Trainer):
    """A trainer that saves in the background and blocking in turn."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.times: list[tuple[float, float]] = []

    def save(self, in_background: bool | None = None) -> Path:
        self.checkpoints.wait()  # not this save's time
        begin = time.perf_counter()
        path = super().save(in_background=len(self.times) % 2 == 1)
        self.times.append((begin, time.perf_counter()))
        return path

    def median(self, in_background: bool) -> tuple[float, float]:
        """Median seconds of a save, and from its begin to the next one's; the first of each kind warms up."""
        mine = range(3 if in_background else 2, len(self.times) - 1, 2)
        stalls = [self.times[n][1] - self.times[n][0] for n in mine]
        wholes = [self.times[n + 1][0] - self.times[n][0] for n in mine]
        return statistics.median(stalls), statistics.median(wholes)
