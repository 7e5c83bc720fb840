"""Which micro-batches a run may have where samples belong together."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.memory.test_shortage import Hungry, losses
from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.config.deepspeed_section import BatchSizes, keeps_together
from trunkline.engine.errors import ConfigError, TrunklineError
from trunkline.engine.memory.micro_batch import MicroBatches, divisors
from trunkline.engine.memory.shortage import Shortage
from trunkline.engine.plan import make_plan, sizes_of
from trunkline.engine.ranks.distributed import Ranks, start
from trunkline.engine.trainer import Trainer
from trunkline.engine.trials import find_micro_batch

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def groups_of(sizes: BatchSizes, multiple: int) -> set[frozenset[int]]:
    """The places of the global batch that pass through the model together, cut at each multiple of a micro-batch."""
    found = set()
    for micro in range(sizes.world_size * sizes.grad_accum_steps):
        places = range(micro * sizes.micro_batch_size, (micro + 1) * sizes.micro_batch_size)
        found |= {frozenset(places[at : at + multiple]) for at in range(0, len(places), multiple)}
    return found


@pytest.mark.parametrize(
    ("total", "world_size", "multiple"), [*itertools.product((8, 12, 20, 60), (1, 2, 4), (1, 2, 4, 5))]
)
def test_divisors_are_those_that_leave_the_groups_of_the_global_batch_whole(
    total: int, world_size: int, multiple: int
) -> None:
    wanted = groups_of(BatchSizes(total, total, 1, 1), multiple)
    fitting = []
    for micro in range(1, total + 1):
        steps, rest = divmod(total, micro * world_size)
        if steps and not rest:
            sizes = BatchSizes(total, micro, steps, world_size)
            if groups_of(sizes, multiple) == wanted:
                fitting.append(micro)
            assert keeps_together(sizes, multiple) == (micro in fitting)
    assert divisors(BatchSizes(total, total, 1, world_size), multiple) == fitting


def test_a_micro_batch_is_halved_to_whole_groups_until_there_is_one(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, deepspeed={"train_batch_size": 48})
    task = TinyTask(config.data, config.model)
    plan = make_plan(task, config, 1, task.build_model())
    micro = MicroBatches(tmp_path, BatchSizes(48, 24, 2, 1), {}, ALONE, multiple=4)
    for size in (12, 4):
        micro.halve(3, Shortage("rank 0: full", agreed=True), plan)
        assert micro.sizes.micro_batch_size == size
    with pytest.raises(TrunklineError, match="step 3 does not fit into memory with 4 samples, which belong together"):
        micro.halve(3, Shortage("rank 0: full", agreed=True), plan)
    again = MicroBatches(tmp_path, BatchSizes(48, 24, 2, 1), {}, ALONE, multiple=4)
    assert again.sizes.micro_batch_size == 4


def test_a_remembered_micro_batch_that_tears_groups_apart_is_left_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remembered = {"micro_batch_size": 6, "evaluation_micro_batch_size": 6, "why": "", "for": {}}
    (tmp_path / "memory.json").write_text(json.dumps(remembered))
    sizes = BatchSizes(48, 24, 2, 1)
    assert MicroBatches(tmp_path, sizes, {}, ALONE, multiple=3).sizes.micro_batch_size == 6
    assert MicroBatches(tmp_path, sizes, {}, ALONE, multiple=4).sizes.micro_batch_size == 24
    assert "micro_batch_size 6 does not divide the global batch into groups of 4" in capsys.readouterr().out


def pairs(folder: Path, limit: int | None = None, **deepspeed: Any) -> tuple[Hungry, Any]:
    config = tiny_config(folder, deepspeed={"train_batch_size": 16, "train_micro_batch_size_per_gpu": 16} | deepspeed)
    task = Hungry(config, limit)
    task.micro_batch_multiple = 4
    return task, config


def test_sizes_that_tear_groups_apart_are_an_error_with_the_way_out(tmp_path: Path) -> None:
    task, config = pairs(tmp_path, train_micro_batch_size_per_gpu=2)
    with pytest.raises(ConfigError) as raised:
        Trainer(task, config, start(), tmp_path / "run")
    assert str(raised.value) == (
        f"{tmp_path}/tiny.json: deepspeed.train_micro_batch_size_per_gpu: 2 samples on each of 1 ranks are no multiple "
        'of the 4 that belong together (Hungry.micro_batch_multiple): use a multiple of 4, or "auto", for it, or a '
        "divisor of 2 for Hungry.micro_batch_multiple"
    )
    task, config = pairs(tmp_path, train_micro_batch_size_per_gpu="auto", train_batch_size=24)
    with pytest.raises(ConfigError, match=r"6 samples on each of 4 ranks .*a multiple of 16 for deepspeed.train_batch"):
        sizes_of(task, config, 4)


def test_the_search_and_a_shortage_keep_groups_whole(tmp_path: Path) -> None:
    task, config = pairs(tmp_path / "a", limit=7)
    trainer = Trainer(task, config, start(), tmp_path / "found")
    find_micro_batch(trainer)
    assert trainer.micro.sizes == BatchSizes(16, 4, 4, 1)
    trainer.run()
    task, config = pairs(tmp_path / "b", limit=7)
    halved = Trainer(task, config, start(), tmp_path / "halved")
    halved.run()
    assert halved.micro.sizes == BatchSizes(16, 4, 4, 1)
    assert losses(tmp_path / "halved") == losses(tmp_path / "found")
