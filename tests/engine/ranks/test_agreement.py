"""Ranks that differ do not train: every rank hears which one, in what, and both values."""

from __future__ import annotations

import os
import random
import re
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.distributed import run_distributed_test
from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.errors import ConfigError, TrunklineError
from trunkline.engine.ranks import start_facts
from trunkline.engine.ranks.agreement import agree, tell
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer


def said(start_up: Callable[[], Any]) -> str:
    """What a start-up raises, by class and words; nothing if it raises nothing."""
    try:
        start_up()
    except TrunklineError as error:
        return f"{type(error).__name__}: {error}"
    return ""


class OtherData(TinyTask):
    def fingerprint(self) -> str:
        return f"store-{os.environ['RANK']}"


class OtherWeight(TinyTask):
    """Draws one weight from a generator that nobody has seeded."""

    def build_model(self) -> nn.Module:
        model = super().build_model()
        model.blocks[1].norm.weight.data[3] = random.SystemRandom().random()
        return model


class OtherBuffer(TinyTask):
    def build_model(self) -> nn.Module:
        model = super().build_model()
        model.offset.fill_(int(os.environ["RANK"]))
        return model


DIFFERENCES: dict[str, tuple[dict[str, Any], type[TinyTask], dict[str, Any], str]] = {
    "seed": ({"training": {"seed": 7}}, TinyTask, {}, "training.seed is 7, but 42 on rank 0"),
    "rate": (
        {"deepspeed": {"optimizer": {"params": {"lr": 0.1}}}}, TinyTask, {},
        "deepspeed.optimizer.params.lr is 0.1, but 0.01 on rank 0"),
    "steps": ({"training": {"steps": 9}}, TinyTask, {}, "training.steps is 9, but 12 on rank 0"),
    "time-out": (
        {"training": {"hang_timeout_s": 60.0}}, TinyTask, {}, "training.hang_timeout_s is 60.0, but 1800.0 on rank 0"),
    "backend": ({}, TinyTask, {"backend": "fsdp"}, '--backend is "fsdp", but "deepspeed" on rank 0'),
    "resume": ({}, TinyTask, {"resume": "auto"}, '--resume is "auto", but "none" on rank 0'),
    "data": ({}, OtherData, {}, 'data is "store-1", but "store-0" on rank 0'),
    "weight": ({}, OtherWeight, {}, 'initial value of blocks.1.norm.weight is "float32 [8] '),
    "buffer": ({}, OtherBuffer, {}, 'initial value of offset is "float32 [1] '),
}  # fmt: skip


def start_differently(rank: int, world_size: int, folder: Path, layouts: list[tuple[str, int]]) -> dict[str, str]:
    heard = {}
    for backend, stage in layouts:
        for name, (sections, task, options, _) in DIFFERENCES.items():
            if stage and name != "weight":  # found before there is a backend
                continue
            section = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 1}
            own: dict[str, Any] = sections if rank == 1 else {}
            config = tiny_config(folder / str(rank), **own | {"deepspeed": section | own.get("deepspeed", {})})
            start_up = partial(Trainer, task(config.data, config.model), config, start(), folder / name)
            heard[f"{name} {backend} {stage}"] = said(
                partial(start_up, **{"backend": backend} | (options if rank == 1 else {}))
            )
    return heard


@pytest.mark.distributed
def test_what_ranks_may_not_differ_in_is_named_on_all_of_them(tmp_path: Path) -> None:
    layouts = [("deepspeed", 0), ("deepspeed", 3), ("fsdp", 3)]
    one, two = run_distributed_test(start_differently, 2, tmp_path, layouts, backend=None)
    assert one == two
    for case, heard in one.items():
        assert heard.startswith("DisagreementError"), case
        assert f"rank 1: {DIFFERENCES[case.split()[0]][3]}" in heard, heard


def start_alone(rank: int, world_size: int, faults: dict[int, dict[str, str]]) -> tuple[str, float]:
    os.environ |= faults.get(rank, {})
    began = time.monotonic()
    if "LATE" in os.environ:
        return "", 0.0
    return said(lambda: start(timeout_s=2.0)), time.monotonic() - began


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("faults", "heard"),
    [
        ({1: {"LATE": "1"}}, ["rank 1: has not come within 2 s", ""]),
        ({1: {"WORLD_SIZE": "3"}}, ["rank 1: WORLD_SIZE is 3, but 2 on rank 0"] * 2),
        ({0: {"LATE": "1"}}, ["", "does not reach rank 0 there"]),
        ({1: {"RANK": "2", "WORLD_SIZE": "3"}, 0: {"WORLD_SIZE": "3"}}, ["rank 1: has not come within 2 s"] * 2),
    ],
)
def test_a_rank_that_is_missing_or_of_another_world_is_named_in_time(
    faults: dict[int, dict[str, str]], heard: list[str]
) -> None:
    for (found, seconds), expected in zip(run_distributed_test(start_alone, 2, faults, backend=None), heard):
        assert expected in found
        assert bool(found) == bool(expected)
        assert seconds < 30


def start_twice_as_rank_one(rank: int, world_size: int, folder: Path) -> str:
    os.environ["WORLD_SIZE"] = "2"
    if rank == 2:
        wait_for(folder / "met")
        os.environ |= {"RANK": "1", "LOCAL_RANK": "1"}
    heard = said(lambda: start(timeout_s=60.0))
    (folder / ("heard" if rank == 2 else "met")).touch()
    wait_for(folder / "heard")
    return heard


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.02)


@pytest.mark.distributed
def test_two_processes_of_one_rank_are_told_apart(tmp_path: Path) -> None:
    zero, one, two = run_distributed_test(start_twice_as_rank_one, 3, tmp_path, backend=None)
    assert zero == one == ""
    assert "is rank 1 already, and so is process" in two


def fail_alone(rank: int, world_size: int, failing: int, begun: bool) -> tuple[str, float]:
    if begun:
        start(timeout_s=60.0)
    began = time.monotonic()
    if rank == failing:
        tell(ConfigError("data.store: nowhere is not there"))
        return "", time.monotonic() - began
    return said(lambda: agree({"training.seed": 1}) if begun else start(timeout_s=60.0)), time.monotonic() - began


@pytest.mark.distributed
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_start_ends_the_start_of_the_others(failing: int, begun: bool) -> None:
    heard = run_distributed_test(fail_alone, 2, failing, begun, backend=None)
    assert all(seconds < 20 for _, seconds in heard)
    assert re.search(rf"rank {failing}:? cannot start: data.store: nowhere is not there", heard[1 - failing][0])


def start_from(rank: int, world_size: int, copy: Path) -> str:
    if rank == 1:
        start_facts._ROOT = copy
    return said(lambda: start(timeout_s=60.0))


@pytest.mark.distributed
def test_ranks_of_other_code_are_refused_with_the_file(tmp_path: Path) -> None:
    for folder in ("engine", "kernels", "launchers", "models"):
        shutil.copytree(start_facts._ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "engine/data/order.py").open("a") as file:
        file.write("# changed on one machine\n")
    (tmp_path / "models/extra.py").touch()
    one, two = run_distributed_test(start_from, 2, tmp_path, backend=None)
    assert one == two
    assert re.search(r'rank 1: code of engine/data/order.py is "\w+", but "\w+" on rank 0', one)
    assert re.search(r'rank 1: code of models/extra.py is "\w+", but not there on rank 0', one)
