"""The search for the largest micro-batch that fits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tests.distributed import run_distributed_test
from tests.engine.memory.test_shortage import Hungry, config_of, losses, train, trainer_of
from tests.engine.tiny import TinyTask
from trunkline.engine.config.deepspeed_section import BatchSizes
from trunkline.engine.errors import TrunklineError
from trunkline.engine.memory.micro_batch import divisors
from trunkline.engine.planned_memory import activation_bytes
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.engine.trials import find_micro_batch


def found_micro_batch(folder: Path, backend: str, stage: int, limit: int | None, resume: str = "none") -> Trainer:
    config = config_of(folder.with_name(f"of {start().rank}"), stage, 1)
    trainer = trainer_of(Hungry(config, limit), config, folder, backend, resume)
    find_micro_batch(trainer)
    trainer.run()
    return trainer


@pytest.mark.parametrize("limit", [7, *(pytest.param(limit, marks=pytest.mark.slow) for limit in (None, 8, 1))])
def test_the_largest_micro_batch_is_found_and_leaves_no_trace_in_the_losses(tmp_path: Path, limit: int | None) -> None:
    trainer = found_micro_batch(tmp_path / "found", "deepspeed", 2, limit)
    largest = max(size for size in divisors(trainer.micro.sizes) if size <= (limit or 16))
    assert trainer.micro.sizes.micro_batch_size == largest
    train(tmp_path / "chosen", 2, largest, "deepspeed")
    assert losses(tmp_path / "found") == losses(tmp_path / "chosen")


def find_on_a_rank(rank: int, world_size: int, folder: Path, backend: str, stage: int) -> None:
    trainer = found_micro_batch(folder / "run", backend, stage, limit=4 if rank == 1 else None)
    assert trainer.micro.sizes == BatchSizes(16, 4, 2, 2)


@pytest.mark.distributed
@pytest.mark.parametrize(("backend", "stage"), [("fsdp", 3), pytest.param("deepspeed", 3, marks=pytest.mark.slow)])
def test_the_largest_micro_batch_is_that_of_the_rank_with_the_least_memory(
    tmp_path: Path, backend: str, stage: int
) -> None:
    run_distributed_test(find_on_a_rank, 2, tmp_path, backend, stage, backend=None)


def test_looking_for_a_micro_batch_again_keeps_to_the_one_that_was_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found_micro_batch(tmp_path / "run", "deepspeed", 0, limit=4)
    said = capsys.readouterr().out
    assert "micro-batch      8: out of memory" in said
    assert "micro-batch      4: fits, peak" in said
    trainer = found_micro_batch(tmp_path / "run", "deepspeed", 0, limit=4, resume="auto")
    assert trainer.micro.sizes.micro_batch_size == 4
    assert "memory.json to look again" in capsys.readouterr().out


def test_sizes_whose_counted_memory_is_beyond_the_machines_are_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path / "of", 0, 1)
    trainer = Trainer(task := TinyTask(config.data, config.model), config, start(), tmp_path / "run")
    memory = trainer.assembly.plan["memory_bytes"]
    needs: Callable[[int], int] = lambda size: (  # noqa: E731
        sum(memory.values()) - memory["activations"] + (activation_bytes(task, task.build_model(), config, size) or 0)
    )
    free = SimpleNamespace(available=needs(8) / 0.8 + 1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    find_micro_batch(trainer)
    assert trainer.micro.sizes.micro_batch_size == 8
    said = capsys.readouterr().out
    assert "micro-batch     16 and more: not tried" in said
    assert "micro-batch     16: " not in said


def test_one_sample_that_does_not_fit_ends_the_search(tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match=r"a single sample does not fit into memory .*activation_checkpointing"):
        found_micro_batch(tmp_path / "run", "deepspeed", 0, limit=0)
