"""A run that is asked to stop, however and whenever, saves what it did, leaves no process behind and ends with 75."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from tests.distributed import find_free_port, run_distributed_test
from tests.engine.tiny import TinyTask, tiny_config
from tests.processes import members, wait_until
from trunkline.engine.machine import stopping
from trunkline.engine.machine.stopping import InterruptedRunError
from trunkline.engine.ranks import lookout
from trunkline.engine.ranks.distributed import start
from trunkline.engine.record.metrics_file import read_metrics
from trunkline.engine.task import Batch, Sums
from trunkline.engine.trainer import Trainer

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent
ENDLESS = {"steps": 1_000_000, "eval_every": 1_000_000, "save_every": 1_000_000, "num_workers": 2}


class Signalled(TinyTask):
    """Sends this process a signal in its nth evaluation batch, counted from 1, and counts them."""

    def __init__(self, config: Any, number: signal.Signals, at: int) -> None:
        super().__init__(config.data, config.model)
        self.number, self.at, self.batches = number, at, 0

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        self.batches += 1
        if self.batches == self.at:
            os.kill(os.getpid(), self.number)
            wait_until(lambda: stopping.requested() is not None)  # a thread hears it, when the machine lets it
        return super().evaluate(model, batch)


@pytest.fixture(autouse=True)
def _look_before_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookout, "EVERY_MS", 0)


@pytest.fixture(autouse=True)
def _no_signal_is_ignored() -> Iterator[None]:
    """In the background INT and HUP may be, and a run leaves what is ignored as it is."""
    ignored = [number for number in stopping.SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def rows(folder: Path, split: str) -> list[dict[str, Any]]:
    found = [row for row in read_metrics(folder / "metrics.jsonl") if row["split"] == split]
    return [{key: value for key, value in row.items() if key not in ("time", "seconds")} for row in found]


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_in_an_evaluation_saves_the_step_and_the_evaluation_is_made_once_later(
    tmp_path: Path, number: signal.Signals
) -> None:
    config = tiny_config(tmp_path, training={"steps": 4, "eval_every": 2, "early_stopping": {"patience": 9}})
    whole = Trainer(TinyTask(config.data, config.model), config, start(), tmp_path / "whole")
    whole.run()
    task = Signalled(config, number, at=1 + 6 + 1)  # the first look, the evaluation of step 2, that of step 4
    with pytest.raises(InterruptedRunError, match=rf"by {number.name} after step 4, which is saved"):
        Trainer(task, config, start(), tmp_path / "run").run()
    assert task.batches < 1 + 6 + 6
    assert [row["step"] for row in rows(tmp_path / "run", "val")] == [2]
    for _ in range(2):  # the checkpoint says that the evaluation is due for as long as it is the newest
        resumed = Trainer(TinyTask(config.data, config.model), config, start(), tmp_path / "run", resume="auto")
        resumed.run()
        assert rows(tmp_path / "run", "val") == rows(tmp_path / "whole", "val")
        assert resumed.progress == whole.progress


def test_a_signal_before_the_first_step_leaves_nothing_to_save(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, training={"steps": 2})
    trainer = Trainer(Signalled(config, signal.SIGTERM, at=1), config, start(), tmp_path / "run")
    with pytest.raises(InterruptedRunError, match=r"by SIGTERM before the first step; .*--resume auto"):
        trainer.run()
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def stop_rank_1(rank: int, world_size: int, folder: Path) -> tuple[str, int]:
    lookout.EVERY_MS = 0
    section = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    config = tiny_config(folder / f"config-{rank}", training={"eval_every": 2, "log_every": 5}, deepspeed=section)
    task = Signalled(config, signal.SIGUSR1, at=1 + 1 if rank else 0)
    trainer = Trainer(task, config, start(), folder / "run")
    with pytest.raises(InterruptedRunError) as stopped:
        trainer.run()
    return str(stopped.value), task.batches


@pytest.mark.distributed
def test_a_signal_to_one_rank_in_an_evaluation_stops_both_in_the_same_batch(tmp_path: Path) -> None:
    (said_0, batches_0), (said_1, batches_1) = run_distributed_test(stop_rank_1, 2, tmp_path, backend=None)
    assert "by a signal to another rank after step 2, which is saved" in said_0
    assert "by SIGUSR1 after step 2" in said_1
    assert batches_0 == batches_1 < 1 + 6
    assert [row["step"] for row in rows(tmp_path / "run", "train")] == [2]
    assert (tmp_path / "run/checkpoints/step-00000002/MANIFEST.json").exists()


class SignalledInAStep(TinyTask):
    """Sends this process a signal in its nth micro-batch of training, counted from 1, and counts them."""

    def __init__(self, config: Any, at: int) -> None:
        super().__init__(config.data, config.model)
        self.at, self.micro_batches = at, 0

    def loss(self, model: nn.Module, batch: Batch) -> Sums:
        if model.training and torch.is_grad_enabled():
            self.micro_batches += 1
            if self.micro_batches == self.at:
                os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(model, batch)


FEW = (("deepspeed", 3), ("fsdp", 3))
ALL = (*FEW, ("deepspeed", 0), ("deepspeed", 2), ("fsdp", 0))


def break_off_a_step(rank: int, world_size: int, folder: Path, layouts: tuple[tuple[str, int], ...]) -> list[int]:
    lookout.EVERY_MS = 0
    made = []
    for backend, stage in layouts:
        section = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 1}
        name = f"{backend}{stage}"
        config = tiny_config(
            folder / f"{name}-{rank}", data={"noise": 0.1}, model={"dropout": 0.2}, training={"steps": 5},
            deepspeed=section | {"train_batch_size": 8},
        )  # fmt: skip
        Trainer(TinyTask(config.data, config.model), config, start(), folder / f"{name}-whole", backend).run()
        planned = 1  # the plan counts what autograd keeps of one
        task = SignalledInAStep(config, at=0 if rank else planned + 2 * (8 // world_size) + 2)
        with pytest.raises(InterruptedRunError):
            Trainer(task, config, start(), folder / name, backend).run()
        made.append(task.micro_batches)
        Trainer(TinyTask(config.data, config.model), config, start(), folder / name, backend, "auto").run()
    return made


@pytest.mark.distributed
@pytest.mark.parametrize("layouts", [FEW, pytest.param(ALL, marks=pytest.mark.slow)])
def test_a_step_is_broken_off_after_a_micro_batch_and_made_again_exactly(
    tmp_path: Path, layouts: tuple[tuple[str, int], ...]
) -> None:
    made = run_distributed_test(break_off_a_step, 2, tmp_path, layouts, backend=None)
    assert made[0] == made[1]
    for backend, stage in layouts:
        run, whole = tmp_path / f"{backend}{stage}", tmp_path / f"{backend}{stage}-whole"
        assert [row["loss"] for row in rows(run, "train")] == [row["loss"] for row in rows(whole, "train")]
        assert len(rows(run, "train")) == 5
        assert (run / "checkpoints/step-00000002").is_dir()


def test_a_run_outside_the_main_thread_trains_without_handlers(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, training={"steps": 2, "num_workers": 1})
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    trainers: list[Trainer] = []

    def run() -> None:
        trainers.append(Trainer(TinyTask(config.data, config.model), config, start(), tmp_path / "run"))
        trainers[0].run()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert trainers[0].progress.step == 2
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before


def test_handlers_come_back_and_what_nohup_ignores_stays_ignored() -> None:
    def mine(number: int, frame: Any) -> None:
        raise AssertionError("not while another listens")

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGUSR2, mine)
    try:
        with stopping.deferred():
            os.kill(os.getpid(), signal.SIGHUP)
            assert stopping.requested() is None
            os.kill(os.getpid(), signal.SIGUSR2)
            assert stopping.requested() == "SIGUSR2"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR2) is mine
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGUSR2, before[1])


def test_a_forked_child_is_not_the_one_that_is_asked_and_can_be_ended_at_once() -> None:
    with stopping.deferred():
        for _ in range(20):
            child = os.fork()
            if child == 0:
                time.sleep(5)
                os._exit(0)
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        time.sleep(0.05)
        assert stopping.requested() is None


@contextmanager
def running(command: list[str | Path], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A command in a session of its own, and nothing of it afterwards."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip
    try:
        yield process
    finally:
        for left in members(process.pid):
            left.kill()
        process.kill()
        process.communicate()


def has_begun(folder: Path) -> bool:
    return (folder / "metrics.jsonl").exists() and len(read_metrics(folder / "metrics.jsonl")) >= 3


def saved(folder: Path) -> list[Path]:
    return list((folder / "checkpoints").glob("step-*/MANIFEST.json"))


@pytest.mark.fault("TERM to the process group of a run whose loader has two workers")
def test_a_process_group_that_is_ended_saves_although_its_workers_hear_it_too(tmp_path: Path) -> None:
    source = tiny_config(tmp_path, training=ENDLESS).source
    with running([sys.executable, "tests/engine/tiny.py", tmp_path / "run", source]) as process:
        wait_until(lambda: has_begun(tmp_path / "run"))
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            os.killpg(process.pid, number)
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 75, said
        assert "stopped: by SIG" in said
        assert "Traceback" not in said
        assert "DataLoader worker" not in said
        assert saved(tmp_path / "run")
        assert members(process.pid) == []


HANGING_WORKERS = """
import os, sys, time
from trunkline.engine.machine.workers import WORKERS

def work():
    os.write(1, b"working\\n")  # at once: print may write the line feed apart
    time.sleep(3600)

for _ in range(2):
    WORKERS.Process(target=work, daemon=True).start()
if sys.argv[1] == "hang":
    time.sleep(3600)
sys.stdin.readline()
"""


@pytest.mark.parametrize("parent", ["hang", "end"])
def test_workers_that_hang_end_with_their_parent_and_do_not_keep_it(parent: str) -> None:
    with running([sys.executable, "-c", HANGING_WORKERS, parent], stdin=subprocess.PIPE) as process:
        assert process.stdout
        assert [process.stdout.readline() for _ in range(2)] == ["working\n"] * 2
        for worker in psutil.Process(process.pid).children():
            for number in stopping.SIGNALS:
                worker.send_signal(number)
        assert len(members(process.pid)) == 3
        if parent == "hang":
            process.kill()
        else:
            process.communicate("\n", timeout=60)
            assert process.returncode == 0
        wait_until(lambda: not members(process.pid), 20.0)


IDLE_POOL = """
import multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from trunkline.engine.machine.workers import end_with_parent

pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), end_with_parent)
pool.submit(print, "working", flush=True)
time.sleep(3600)
"""


def test_a_pool_of_a_preparation_that_is_killed_does_not_stay() -> None:
    with running([sys.executable, "-c", IDLE_POOL]) as process:
        assert process.stdout
        assert process.stdout.readline() == "working\n"
        process.kill()
        wait_until(lambda: not members(process.pid), 20.0)


@pytest.mark.fault("{number} during the start")
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_during_the_start_is_one_line(tmp_path: Path, number: signal.Signals) -> None:
    source = tiny_config(tmp_path).source
    with running([sys.executable, "tests/engine/tiny.py", tmp_path / "run", source]) as process:

        def listens() -> bool:
            status = Path(f"/proc/{process.pid}/status").read_text()
            caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
            return bool(
                int(caught, 16) & 1 << (signal.SIGUSR2 - 1)
            )  # after INT and USR1; under nohup none is set for HUP

        wait_until(listens)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 75
    assert said == (f"stopped: by {number.name}, with no step under way\n")


TORCHRUN = ["torchrun", "--nproc_per_node", "{ranks}", "--master_port", "{port}"]
DEEPSPEED = ["deepspeed", "--num_gpus", "{ranks}", "--master_port", "{port}"]
LAUNCHED = {
    "TERM to torchrun": (TORCHRUN, "launcher", signal.SIGTERM),
    "KILL to torchrun": (TORCHRUN, "launcher", signal.SIGKILL),
    "USR1 to torchrun, which dies of it": (TORCHRUN, "launcher", signal.SIGUSR1),
    "TERM to torchrun's group": (TORCHRUN, "group", signal.SIGTERM),
    "TERM to deepspeed": (DEEPSPEED, "launcher", signal.SIGTERM),
    "KILL to deepspeed": (DEEPSPEED, "launcher", signal.SIGKILL),
    "INT to deepspeed's group": (DEEPSPEED, "group", signal.SIGINT),
    "TERM of timeout": (["timeout", "600", str(BIN / "torchrun"), *TORCHRUN[1:]], "launcher", signal.SIGTERM),
    "KILL to what deepspeed started": (DEEPSPEED, "child", signal.SIGKILL),
}


@pytest.mark.slow
@pytest.mark.fault("{how}, with {ranks} ranks and two workers each")
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("how", LAUNCHED)
def test_a_launcher_that_is_ended_or_lost_stops_its_ranks_which_save(tmp_path: Path, how: str, ranks: int) -> None:
    launcher, whom, number = LAUNCHED[how]
    source = tiny_config(tmp_path, training=ENDLESS, deepspeed={"train_micro_batch_size_per_gpu": 1}).source
    command = [word.format(ranks=ranks, port=find_free_port()) for word in launcher]
    command[0] = str(BIN / command[0]) if (BIN / command[0]).exists() else command[0]
    with running([*command, "tests/engine/tiny.py", tmp_path / "run", source]) as process:
        wait_until(lambda: has_begun(tmp_path / "run"))
        if whom == "group":
            os.killpg(process.pid, number)
        elif whom == "child":
            psutil.Process(process.pid).children()[0].send_signal(number)
        else:
            process.send_signal(number)
        wait_until(lambda: not members(process.pid), 60.0)
        said = process.communicate(timeout=60)[1]
    assert "stopped: by " in said, said
    assert 'tests/engine/tiny.py", line' not in said
    assert saved(tmp_path / "run")
