"""Tokens of devices, a ridge with switches and repeated events, trained on rollouts.

A step is the same on every layout, and a run however it is broken off.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import run_distributed_test
from tests.models.fluid.baselines.switched_network import write_switched_store
from trunkline.engine.config.run_config import RunConfig, load_config
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.models.fluid.task import FluidTask
from trunkline.models.registry import config_sections

MIDDLE = "checkpoints/step-00000003"
MODEL: dict[str, Any] = {
    "d_model": 32, "num_heads": 2, "num_layers": 1, "d_ff": 32, "d_token": 16, "dense_skip": 8,
    "linear_skip": "switches", "target": "change", "tokens": "device", "window": 2,
    "input_noise": 0.1, "rollout_minutes": 3,
}  # fmt: skip


class Case(NamedTuple):
    """A run in `folder`, from `resume`."""

    config: RunConfig
    folder: Path
    backend: str
    resume: str


def case(
    store: Path, folder: Path, backend: str = "deepspeed", stage: int = 0, micro: int = 4, resume: Path | str = "none"
) -> Case:
    raw = {
        "workload": "fluid",
        "data": {"store": str(store), "history": 3, "event_repeats": 20},
        "model": MODEL,
        "training": {
            "steps": 6, "eval_every": 3, "eval_samples": 40, "save_every": 3, "log_every": 1, "trackers": [],
            "ema": {"decay": 0.5}, "best": {"metric": "rollout_mse"},
        },
        "deepspeed": {
            "train_batch_size": 4,
            "train_micro_batch_size_per_gpu": micro,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-5, "weight_decay": 0.01}},
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": stage},
        },
    }  # fmt: skip
    folder.mkdir(parents=True)
    path = folder / "asked.json"
    path.write_text(json.dumps(raw))
    return Case(load_config(path, sections=config_sections), folder / "run", backend, str(resume))


def train(rank: int, world_size: int, cases: list[Case]) -> None:
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        for config, folder, backend, resume in cases:
            task = FluidTask(config.data, config.model)
            Trainer(task, config, start(), folder, backend=backend, resume=resume).run()


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = {"train": "loss", "val": "rollout_mse"}
    return [row[kept[row["split"]]] for row in rows if row["split"] in kept]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    write_switched_store(root)
    return root


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one rank in whole batches."""
    one = case(store, tmp_path_factory.mktemp("whole") / "one")
    train(0, 1, [one])
    assert len(losses(one.folder)) == 8
    return one.folder


def same(folder: Path, other: Path, resumed: bool = False) -> None:
    """Assert the losses and the weights of another run, up to rounding; of its second half if resumed."""
    assert losses(folder) == pytest.approx(losses(other)[4 if resumed else 0 :], rel=1e-4), folder
    mine, theirs = (load_file(run / "final/model.safetensors") for run in (folder, other))
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-5, msg=f"{folder}: {name}")


def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(store: Path, whole: Path, tmp_path: Path) -> None:
    after = case(store, tmp_path / "after", resume=whole / MIDDLE)
    train(0, 1, [after])
    assert losses(after.folder) == losses(whole)[4:]
    one, two = (load_file(run / "final/model.safetensors") for run in (whole, after.folder))
    assert all(torch.equal(one[name], two[name]) for name in one)


SOME = [("deepspeed", 3), ("fsdp", 3)]
EVERY = [(backend, stage) for backend in ("deepspeed", "fsdp") for stage in range(4)]


@pytest.mark.distributed
@pytest.mark.parametrize("layouts", [SOME, pytest.param(EVERY, marks=pytest.mark.slow)], ids=["some", "every"])
def test_two_ranks_train_as_one_and_resume_another_layout(
    store: Path, whole: Path, tmp_path: Path, layouts: list[tuple[str, int]]
) -> None:
    """Each layout hands a checkpoint to the next one."""
    first, second = [], []
    for place, (backend, stage) in enumerate(layouts):
        folder = tmp_path / f"{backend}-{stage}"
        first.append(case(store, folder / "first", backend, stage, micro=1))
        then = layouts[(place + 1) % len(layouts)]
        second.append(case(store, folder / "then", *then, micro=2, resume=first[-1].folder / MIDDLE))
    run_distributed_test(train, 2, [*first, *second], backend=None, timeout_s=600)
    for run in (*first, *second):
        same(run.folder, whole, resumed=run.resume != "none")
