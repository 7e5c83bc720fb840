"""A run in which a rank hangs, stops or dies ends soon, and says which rank it was."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.distributed import start
from engine.task import Batch
from engine.trainer import Trainer
from tests.distributed import run_distributed_test
from tests.engine.tiny import TinyTask, tiny_config

AT_BATCH = 9


class Failing(TinyTask):
    """A task whose data fails on one rank, some batches into the run."""

    def __init__(self, config: Any, fault: str) -> None:
        super().__init__(config.data, config.model)
        self.fault, self.batches = fault, 0

    def collate(self, samples: Sequence[Any]) -> Batch:
        self.batches += 1
        if self.batches == AT_BATCH and self.fault == "hang":
            time.sleep(3600)
        if self.batches == AT_BATCH and self.fault:
            time.sleep(1.0)  # long enough to be noted
            os.kill(os.getpid(), {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}[self.fault])
        return super().collate(samples)


def train(rank: int, world_size: int, folder: Path, fault: str) -> None:
    training = {"hang_timeout_s": 2.0 if fault != "kill" else 60.0, "steps": 40}
    config = tiny_config(folder / f"config-{rank}", training=training)
    sys.stderr = (folder / f"stderr-{rank}").open("w")
    Trainer(Failing(config, fault if rank == 1 else ""), config, start(), folder / "run").run()


@pytest.mark.fault("a rank that hangs in its data, or is stopped: {fault}")
@pytest.mark.distributed
@pytest.mark.parametrize("fault", ["hang", "stop"])
def test_a_rank_that_hangs_is_named_with_its_step_and_place(tmp_path: Path, fault: str) -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match="exit code 76"):
        run_distributed_test(train, 2, tmp_path, fault, backend=None, timeout_s=60)
    assert time.monotonic() - began < 30
    said = (tmp_path / "stderr-0").read_text()
    assert "no progress for 2 s (training.hang_timeout_s), waiting for rank 1" in said
    assert "rank 0: step 3, all-reduce of the batch's weight, for " in said
    assert "rank 1: step 3, reading the next batch, for " in said
    assert ("last heard of" in said) == (fault == "stop")
    assert "--resume auto" in said


@pytest.mark.fault("kill -9 of one rank between saves")
@pytest.mark.distributed
def test_the_rank_that_is_left_says_that_another_has_ended(tmp_path: Path) -> None:
    with pytest.raises(
        AssertionError, match=r"(?s)rank 0 failed.*TrunklineError: another rank has ended, .*step 3.*--resume auto"
    ):
        run_distributed_test(train, 2, tmp_path, "kill", backend=None, timeout_s=60)


def test_nothing_is_left_of_the_notes_of_a_run_that_ended_well(tmp_path: Path) -> None:
    train(0, 1, tmp_path, "")
    assert not (tmp_path / "run/.ranks").exists()
