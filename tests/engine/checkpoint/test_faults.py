"""kill -9 at any moment: the run resumes, and its losses are those of a run that nobody killed."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import fork_server
from tests.engine.tiny import TinyData, TinyModel, TinyTask, tiny_config
from trunkline.engine.config.run_config import load_config

often = pytest.mark.parametrize("kills_wanted", [3, pytest.param(10, marks=pytest.mark.slow)])


def run(folder: Path, source: str) -> None:
    from trunkline.engine.ranks.distributed import start
    from trunkline.engine.trainer import Trainer

    config = load_config(source, sections=lambda name: (TinyData, TinyModel))
    Trainer(TinyTask(config.data, config.model), config, start(), folder, resume="auto").run()


def start_run(folder: Path, source: str) -> Any:
    process = fork_server().Process(target=run, args=(folder, source))
    process.start()
    return process


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["split"] == "train"}


def logged(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b'"train"') if metrics.exists() else 0


def kill_when(folder: Path, source: str, moment: Callable[[], bool]) -> bool:
    """Start (or resume) the run and kill -9 it at the moment. False if it was done before that."""
    process = start_run(folder, source)
    while process.is_alive():
        if moment():
            process.kill()
            process.join()
            return True
        time.sleep(0.002)
    process.join()
    assert process.exitcode == 0
    return False


def config_source(folder: Path, steps: int, save_every: int) -> str:
    training = {"steps": steps, "save_every": save_every, "eval_every": 7}
    # a wider model, so that a save takes long enough to be hit
    return tiny_config(
        folder, data={"noise": 0.1}, model={"dropout": 0.2, "hidden": 256}, training=training,
        deepspeed={"zero_optimization": {"stage": 2}},
    ).source  # fmt: skip


@pytest.mark.slow
@pytest.mark.fault("kill -9 at {kills_wanted} random steps of one run")
@often
def test_killed_at_random_steps_and_resumed_it_gives_the_losses_of_an_unbroken_run(
    tmp_path: Path, kills_wanted: int
) -> None:
    source = config_source(tmp_path, steps=24 * kills_wanted, save_every=3)
    unbroken = start_run(tmp_path / "unbroken", source)
    chance = random.Random(time.time_ns())
    kills = 0
    while kills < kills_wanted:
        goal = min(24 * kills_wanted - 1, logged(tmp_path / "killed") + chance.randint(0, 6))
        if not kill_when(tmp_path / "killed", source, lambda goal=goal: logged(tmp_path / "killed") > goal):
            break
        kills += 1
    assert kills == kills_wanted
    unbroken.join()
    last = start_run(tmp_path / "killed", source)
    last.join()
    assert last.exitcode == unbroken.exitcode == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "unbroken")
    one, two = (load_file(tmp_path / name / "final/model.safetensors") for name in ("killed", "unbroken"))
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.fault("kill -9 in {kills_wanted} random moments of saves of one run")
@often
def test_killed_during_saves_and_resumed_it_gives_the_losses_of_an_unbroken_run(
    tmp_path: Path, kills_wanted: int
) -> None:
    source = config_source(tmp_path, steps=16 * kills_wanted, save_every=1)
    unbroken = start_run(tmp_path / "unbroken", source)
    folder = tmp_path / "killed/checkpoints"
    chance = random.Random(time.time_ns())
    hits = 0
    for _ in range(4 * kills_wanted):
        wanted = chance.randint(1, 3)
        started: set[str] = set()

        def in_a_save(started: set[str] = started, wanted: int = wanted) -> bool:
            staging = (
                {entry.name for entry in os.scandir(folder) if entry.name.startswith(".")} if folder.is_dir() else set()
            )
            started |= staging
            if len(started) < wanted or not staging:
                return False
            time.sleep(chance.random() * 0.02)
            return True

        if not kill_when(tmp_path / "killed", source, in_a_save):
            break
        hits += any(path.name.startswith(".staging") for path in folder.iterdir())
        if hits == kills_wanted:
            break
    assert hits == kills_wanted, "too few kills hit a save that was under way"
    unbroken.join()
    last = start_run(tmp_path / "killed", source)
    last.join()
    assert last.exitcode == unbroken.exitcode == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "unbroken")
