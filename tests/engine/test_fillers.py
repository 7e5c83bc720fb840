"""A micro-batch that has no sample on any rank is left out, and nothing changes by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed import run_distributed_test
from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.data.loading import collate
from trunkline.engine.data.order import FILLER
from trunkline.engine.ranks.distributed import start
from trunkline.engine.task import Batch
from trunkline.engine.trainer import Trainer

SAMPLES, BATCH, MICRO, STEPS = 21, 8, 1, 7


def steps_of(folder: Path, backend: str, stage: int, with_fillers: bool) -> tuple[list[int], list[dict[str, float]]]:
    """Forward passes and values of each step. The third and the sixth have five samples in place of eight."""
    section = {"train_micro_batch_size_per_gpu": MICRO, "zero_optimization": {"stage": stage}}
    data, model = {"samples": SAMPLES, "noise": 0.1}, {"dropout": 0.2}
    config = tiny_config(
        folder / f"of-{start().rank}", data=data, model=model, training={"steps": STEPS}, deepspeed=section
    )
    task = TinyTask(config.data, config.model)
    trainer = Trainer(task, config, start(), folder / "run", backend)
    forwards: list[Any] = []
    trainer.backend.module.register_forward_hook(lambda *call: forwards.append(call))
    counts, values = [], []
    for micro_batches in trainer._micro_batches():
        before = len(forwards)
        if with_fillers:
            accumulation = BATCH // MICRO // trainer.ranks.world_size
            micro_batches += [fillers(trainer)] * (accumulation - len(micro_batches))
        made = trainer.stepper.make(micro_batches)
        assert made is not None
        values.append(trainer.stepper.values(made))
        counts.append(len(forwards) - before)
    trainer.close()
    return counts, values


def fillers(trainer: Trainer) -> Batch:
    return collate(trainer.task, [trainer.dataset[0]] * MICRO, [np.full(MICRO, FILLER)] * 2)


def compare(rank: int, world_size: int, folder: Path, layouts: list[tuple[str, int]]) -> None:
    accumulation, short = BATCH // MICRO // world_size, -(-(SAMPLES % BATCH) // world_size)
    for backend, stage in layouts:
        whole, expected = steps_of(folder / f"{backend}-{stage}-whole", backend, stage, with_fillers=True)
        counts, values = steps_of(folder / f"{backend}-{stage}", backend, stage, with_fillers=False)
        assert whole == [accumulation] * STEPS
        assert counts == [short if step in (2, 5) else accumulation for step in range(STEPS)]
        assert values == expected, (backend, stage)


@pytest.mark.parametrize("backend", ["deepspeed", "fsdp"])
@pytest.mark.parametrize("stage", range(4))
def test_one_rank_leaves_out_what_holds_fillers_alone(tmp_path: Path, backend: str, stage: int) -> None:
    compare(0, 1, tmp_path, [(backend, stage)])


@pytest.mark.distributed
def test_two_ranks_leave_out_what_holds_fillers_alone_on_both(tmp_path: Path) -> None:
    """In the last micro-batch that is made, one rank has a sample and the other a filler."""
    layouts = [(backend, stage) for backend in ("deepspeed", "fsdp") for stage in range(4)]
    run_distributed_test(compare, 2, tmp_path, layouts, backend=None)
