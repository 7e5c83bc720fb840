"""A step is the same however its ragged samples are split, and a run however it is broken off."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import run_distributed_test
from tests.models.killed import unbroken_and_killed
from tests.models.seq2seq.toy_pairs import SILENT, toy_config
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.data.randomness import seed_torch
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.models.registry import make_task
from trunkline.models.seq2seq.chat_flags import FROZEN

STEPS = 6
Case = tuple[RunConfig, Path, str, str]
"""Configuration, folder, backend, and what it resumes from."""


def config_of(
    folder: Path, pairs: Path, frozen: bool = False, micro: int = 8, stage: int = 0, **more: Any
) -> RunConfig:
    training = {"steps": STEPS, "eval_every": 3, "save_every": 3, "parameters": [FROZEN] if frozen else [], **more}
    section = {
        "train_micro_batch_size_per_gpu": micro, "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamWScale", "params": {"lr": 0.01, "weight_decay": 0.0}},
    }  # fmt: skip
    return toy_config(folder, pairs, model=SILENT, training=training, deepspeed=section)


def train(rank: int, world_size: int, cases: list[Case]) -> None:
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        for config, folder, backend, resume in cases:
            Trainer(make_task(config), config, start(), folder, backend=backend, resume=resume).run()


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["split"] in ("train", "val")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final/model.safetensors")


@pytest.fixture(scope="module")
def whole(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The run of one rank in whole batches, and with the encoder frozen."""
    folder = tmp_path_factory.mktemp("whole")
    for frozen in (False, True):
        train(0, 1, [(config_of(folder, pairs, frozen), folder / str(frozen), "deepspeed", "none")])
    return {frozen: folder / str(frozen) for frozen in (False, True)}


def same(folder: Path, other: Path, resumed: bool = False) -> None:
    """Assert the losses and the weights of another run, up to rounding; of its second half where it was resumed."""
    mine, theirs = weights(folder), weights(other)
    expected = losses(other)[len(losses(other)) // 2 :] if resumed else losses(other)
    assert losses(folder) == pytest.approx(expected, rel=1e-5), folder
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=2e-5, msg=f"{folder}: {name}")


def test_accumulation_changes_nothing(pairs: Path, whole: dict[bool, Path], tmp_path: Path) -> None:
    """The original divided by the number of micro-batches twice."""
    for frozen in (False, True):
        folder = tmp_path / f"{frozen}"
        train(0, 1, [(config_of(tmp_path, pairs, frozen, micro=1), folder, "deepspeed", "none")])
        same(folder, whole[frozen])
    assert losses(whole[True]) != pytest.approx(losses(whole[False]), rel=1e-3), "that freezing counts"


SOME = [("deepspeed", 3, False), ("fsdp", 3, True)]
EVERY = [
    (backend, stage, frozen)
    for frozen in (False, True)
    for backend, stage in [*(("deepspeed", stage) for stage in range(4)), ("fsdp", 2), ("fsdp", 3)]
]


@pytest.mark.distributed
@pytest.mark.parametrize("layouts", [SOME, pytest.param(EVERY, marks=pytest.mark.slow)], ids=["some", "every"])
def test_two_ranks_train_as_one_and_resume_another_layout(
    pairs: Path, whole: dict[bool, Path], tmp_path: Path, layouts: list[tuple[str, int, bool]]
) -> None:
    """The head is tied, also where ZeRO 3 and FSDP shard it. Each layout hands a checkpoint to the next one."""
    first, second = [], []
    for place, (backend, stage, frozen) in enumerate(layouts):
        folder = tmp_path / f"{backend}-{stage}-{frozen}"
        first.append((config_of(folder, pairs, frozen, micro=2, stage=stage), folder / "run", backend, "none"))
        other, next_stage, _ = layouts[(place + 1) % len(layouts)]
        config = config_of(folder / "next", pairs, frozen, micro=2, stage=next_stage)
        second.append((config, folder / "after", other, str(folder / "run/checkpoints/step-00000003")))
    run_distributed_test(train, 2, [*first, *second], backend=None, timeout_s=600)
    for (backend, stage, frozen), (_, run, _, _), (_, after, _, _) in zip(layouts, first, second, strict=True):
        same(run, whole[frozen])
        same(after, whole[frozen], resumed=True)
        if layouts is SOME and backend == "deepspeed":  # one rank takes FSDP's; all of them where there is time
            continue
        alone = tmp_path / f"alone-{backend}-{stage}-{frozen}"
        begun = str(run / "checkpoints/step-00000003")
        train(0, 1, [(config_of(alone, pairs, frozen), alone / "run", "deepspeed", begun)])
        same(alone / "run", whole[frozen], resumed=True)


def test_what_is_frozen_stays_and_the_rest_moves(pairs: Path, whole: dict[bool, Path], tmp_path: Path) -> None:
    config = config_of(tmp_path, pairs, True)
    seed_torch(config.training.seed, 0)
    before = make_task(config).build_model().lm.state_dict()  # type: ignore[operator, union-attr]
    for name, tensor in weights(whole[True]).items():
        is_frozen = name.startswith(("shared.", "encoder."))
        assert torch.equal(tensor, before[name]) is is_frozen, name


def test_each_index_is_a_sample_of_its_own(pairs: Path, tmp_path: Path) -> None:
    """The original's loader ignored it."""
    task: Any = make_task(config_of(tmp_path, pairs))
    records = [json.loads(line) for line in (pairs.parent / "pairs.jsonl").read_text().splitlines()]
    left = {(record["prompt"], record["response"]) for record in records}
    found = []
    for split in ("val", "train"):
        dataset = task.dataset(split)
        found += [tuple(task.tokenizer.decode(side[:-1]) for side in dataset[i][:2]) for i in range(len(dataset))[::-1]]
    assert set(found) == left
    assert len(found) == len(records)


@pytest.mark.slow
@pytest.mark.fault("kill -9 of a fine-tuning with a frozen encoder, and of one without")
@pytest.mark.parametrize("frozen", [False, True])
def test_a_killed_run_ends_as_an_unbroken_one_bit_for_bit(pairs: Path, tmp_path: Path, frozen: bool) -> None:
    config_of(tmp_path, pairs, frozen, micro=4, steps=40, save_every=2)
    arguments = ["--config", str(tmp_path / "config.json"), "--resume", "auto", "--set", "model.dropout=0.1"]
    unbroken, broken = unbroken_and_killed(arguments, tmp_path)
    assert losses(broken) == losses(unbroken)
    one, two = weights(unbroken), weights(broken)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
