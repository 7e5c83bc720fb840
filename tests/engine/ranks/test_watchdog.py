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
import torch
from torch import nn

from tests.distributed import fork_server, run_distributed_test
from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.ranks.distributed import Ranks, start
from trunkline.engine.ranks.watchdog import Watchdog
from trunkline.engine.task import Batch
from trunkline.engine.trainer import Trainer

AT_BATCH = 9


class Failing(TinyTask):
    """A task whose data fails on one rank, some batches into the run."""

    def __init__(self, config: Any, fault: str) -> None:
        super().__init__(config.data, config.model)
        self.fault, self.batches = fault, 0

    def build_model(self) -> nn.Module:
        if self.fault == "hang at the start":
            time.sleep(3600)
        if self.fault == "hang in the same place":  # what DeepSpeed waits in for a lock of the compiler's
            import deepspeed

            deepspeed.initialize = lambda **_: time.sleep(3600)
        if self.fault == "stop at the start":
            time.sleep(1.0)
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().build_model()

    def collate(self, samples: Sequence[Any]) -> Batch:
        self.batches += 1
        if self.batches == AT_BATCH and self.fault == "hang":
            time.sleep(3600)
        if self.batches == AT_BATCH and self.fault in ("stop", "kill"):
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


@pytest.mark.fault("a rank that does not arrive at deepspeed.initialize: {fault}")
@pytest.mark.distributed
@pytest.mark.parametrize(
    "fault",
    [
        "hang in the same place",
        pytest.param("hang at the start", marks=pytest.mark.slow),
        pytest.param("stop at the start", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_hangs_during_the_start_is_named(tmp_path: Path, fault: str) -> None:
    with pytest.raises(AssertionError, match="exit code 76"):
        run_distributed_test(train, 2, tmp_path, fault, backend=None, timeout_s=60)
    said = (tmp_path / "stderr-0").read_text()
    assert "no progress for 2 s (training.hang_timeout_s), waiting for rank 1" in said
    place = "preparing the backend" if fault == "hang in the same place" else "building the model"
    assert f"rank 1: step 0, {place}, for " in said


def save_slowly(rank: int, world_size: int, folder: Path) -> int:
    """On rank 1 each file takes 1.2 s to come to the disk; rank 0 waits for it."""
    fsync = os.fsync
    if rank:
        os.fsync = lambda descriptor: (time.sleep(1.2), fsync(descriptor))[1]
    training = {"hang_timeout_s": 2.0, "steps": 2, "async_save": False}
    config = tiny_config(folder / f"config-{rank}", training=training)
    return Trainer(TinyTask(config.data, config.model), config, start(), folder / "run").run().step


@pytest.mark.fault("a disk that is slow, on one of two ranks")
@pytest.mark.distributed
def test_a_save_that_gets_on_may_take_longer_than_the_timeout(tmp_path: Path) -> None:
    began = time.monotonic()
    assert run_distributed_test(save_slowly, 2, tmp_path, backend=None) == [2, 2]
    assert time.monotonic() - began > 2.4


def wait_while_watched(folder: Path) -> None:
    watchdog = Watchdog(folder / ".ranks", Ranks(0, 1, 0, torch.device("cpu")), 1.5)
    watchdog.start()
    (folder / "begun").touch()
    while not (folder / "end").exists():
        time.sleep(0.02)
    watchdog.stop()


@pytest.mark.fault("a process that is suspended for longer than the timeout, and wakes")
def test_time_in_which_the_process_was_suspended_does_not_count(tmp_path: Path) -> None:
    process = fork_server().Process(target=wait_while_watched, args=(tmp_path,))
    process.start()
    assert process.pid
    while not (tmp_path / "begun").exists():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2.5)
    os.kill(process.pid, signal.SIGCONT)
    time.sleep(0.5)
    (tmp_path / "end").touch()
    process.join()
    assert process.exitcode == 0


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
