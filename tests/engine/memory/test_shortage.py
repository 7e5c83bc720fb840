"""Memory runs out, on any rank, in any part of a step: the run goes on, with smaller micro-batches and equal losses."""

from __future__ import annotations

import gc
import itertools
import json
import os
import resource
import signal
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _coalescing_manager

from tests.distributed import fork_server, run_distributed_test
from tests.engine.tiny import Rows, TinyTask, tiny_config
from trunkline.engine.config.deepspeed_section import BatchSizes
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.data.order import GlobalBatches
from trunkline.engine.errors import TrunklineError
from trunkline.engine.machine.stopping import InterruptedRunError
from trunkline.engine.memory.micro_batch import MicroBatches
from trunkline.engine.memory.shortage import Attempts, OutOfMemory, Shortage, is_out_of_memory
from trunkline.engine.plan import make_plan
from trunkline.engine.progress import Progress
from trunkline.engine.ranks.distributed import Ranks, start
from trunkline.engine.task import Batch, Sums
from trunkline.engine.trainer import Trainer


class _RefuseBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (backward)")


class Hungry(TinyTask):
    """A task on a device that holds `limit` samples of it: more than that is refused, `where` it is asked for.

    The refusal comes in the middle of the network, from step `since` on, and on the ranks where `limit` is set.
    """

    def __init__(self, config: RunConfig, limit: int | None, where: str = "forward", since: int = 0) -> None:
        super().__init__(config.data, config.model)
        self.limit, self.where, self.since = limit, where, since
        self.progress = Progress()

    def build_model(self) -> nn.Module:
        net = super().build_model()
        net.blocks[-1].linear.register_forward_hook(self._refuse)  # type: ignore[index, union-attr]
        return net

    def _refuse(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor | None:
        evaluating = not module.training
        if self.limit is None or len(output) <= self.limit or self.progress.step < self.since:
            return None
        if evaluating != (self.where == "evaluation") or isinstance(output, torch._subclasses.FakeTensor):
            return None
        if self.where == "backward":
            return _RefuseBackward.apply(output)
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 2.00 GiB ({self.where})")


def trainer_of(task: TinyTask, config: RunConfig, folder: Path, backend: str, resume: str = "none") -> Trainer:
    trainer = Trainer(task, config, start(), folder, backend=backend, resume=resume)
    if isinstance(task, Hungry):
        task.progress = trainer.progress
    return trainer


def config_of(folder: Path, stage: int, micro: int, **training: Any) -> RunConfig:
    """With noise and ragged batches: 40 samples by 16 leave 8."""
    sizes = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": micro, "zero_optimization": {"stage": stage}}
    settings = {"steps": 6, "eval_every": 4, "save_every": 9, **training}
    return tiny_config(folder, data={"noise": 0.1}, training=settings, deepspeed=sizes)


def train(folder: Path, stage: int, micro: int, backend: str, **hunger: Any) -> Trainer:
    """One run; `hunger` is what Hungry takes."""
    config = config_of(Path(f"{folder}-{os.environ.get('RANK', 0)}"), stage, micro)
    trainer = trainer_of(Hungry(config, **{"limit": None} | hunger), config, folder, backend)
    trainer.run()
    return trainer


def lines(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


def losses(folder: Path, split: str = "train") -> list[float]:
    return [row["loss"] for row in lines(folder, split)]


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("NCCL error: unhandled cuda error; Cuda failure 2 'out of memory'"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448"), False),
        (ValueError("out of memory"), False),
    ],
)  # fmt: skip
def test_what_an_allocator_says_is_told_from_other_errors(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) == is_one


@pytest.mark.fault("out of memory in the {where} of the first step, {backend} ZeRO {stage}")
@pytest.mark.parametrize(
    ("backend", "stage", "where"),
    [
        ("deepspeed", 0, "forward"),
        ("deepspeed", 2, "backward"),
        pytest.param("deepspeed", 3, "backward", marks=pytest.mark.slow),
        pytest.param("fsdp", 3, "forward", marks=pytest.mark.slow),
    ],
)
def test_out_of_memory_in_the_first_step_gives_the_run_of_smaller_micro_batches_bit_for_bit(
    tmp_path: Path, backend: str, stage: int, where: str
) -> None:
    trainer = train(tmp_path / "broken", stage, 16, backend, limit=4, where=where)
    assert trainer.micro.sizes == BatchSizes(16, 4, 4, 1)
    train(tmp_path / "small", stage, 4, backend)
    assert losses(tmp_path / "broken") == losses(tmp_path / "small")
    assert losses(tmp_path / "broken", "val") == losses(tmp_path / "small", "val")
    assert [row["micro_batch_size"] for row in lines(tmp_path / "broken", "memory")] == [8, 4]


def resumed_by_hand(folder: Path, stage: int, backend: str, at: int) -> None:
    """Stopped before step `at` with whole batches, then resumed with halves of them."""
    trainer = trainer_of(Hungry(config := config_of(folder, stage, 16), None), config, folder / "run", backend)
    step = trainer.backend.step

    def step_then_signal() -> Any:
        if trainer.progress.step + 2 == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return step()

    trainer.backend.step = step_then_signal  # type: ignore[method-assign]
    with pytest.raises(InterruptedRunError):
        trainer.run()
    assert trainer.progress.step == at
    trainer_of(Hungry(config := config_of(folder, stage, 8), None), config, folder / "run", backend, "auto").run()


@pytest.mark.fault("out of memory in the {where} of a later step, {backend} ZeRO {stage}")
@pytest.mark.parametrize(
    ("backend", "stage", "where"),
    [
        ("deepspeed", 3, "backward"),
        ("fsdp", 3, "backward"),
        *(
            pytest.param(backend, stage, where, marks=pytest.mark.slow)
            for backend, stage, where in [
                ("deepspeed", 0, "forward"), ("deepspeed", 0, "backward"), ("deepspeed", 1, "forward"),
                ("deepspeed", 1, "backward"), ("deepspeed", 2, "forward"), ("deepspeed", 2, "backward"),
                ("deepspeed", 3, "forward"), ("fsdp", 0, "forward"), ("fsdp", 0, "backward"), ("fsdp", 2, "forward"),
                ("fsdp", 3, "forward"),
            ]
        ),
    ],
)  # fmt: skip
def test_out_of_memory_in_a_later_step_is_a_stop_and_a_resume_with_half_the_micro_batch(
    tmp_path: Path, backend: str, stage: int, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, stage, 16)
    trainer = trainer_of(Hungry(config, 8, where, since=3), config, tmp_path / "broken", backend)
    first = weakref.ref(trainer.backend.module)
    trainer.run()
    gc.collect()
    assert first() is None  # else there would be two models in memory
    assert "step 3 ran out of memory with 16 samples (rank 0: OutOfMemoryError: CUDA out of" in capsys.readouterr().out
    resumed_by_hand(tmp_path / "by hand", stage, backend, at=3)
    assert losses(tmp_path / "broken") == losses(tmp_path / "by hand/run")
    train(tmp_path / "unbroken", stage, 16, backend)
    assert losses(tmp_path / "broken") == pytest.approx(losses(tmp_path / "unbroken"), rel=1e-6)
    assert [path.name for path in (tmp_path / "broken").glob(".*")] == [".lock"]


def reduce_until_rank_1_is_full(rank: int, world_size: int) -> tuple[str, list[float], bool]:
    attempts, x, y = Attempts(start()), torch.ones(3), torch.ones(2)
    methods, said = dict(vars(dist.ProcessGroup)), ""
    with attempts.attempt(agreed=True):
        dist.all_reduce(x)
        with _coalescing_manager():
            dist.all_reduce(x)
            dist.all_reduce(y)
    try:
        with attempts.attempt(agreed=True):
            dist.all_reduce(x)
            if rank == 1:
                raise torch.OutOfMemoryError("full")
            dist.all_reduce(x)
            raise AssertionError("rank 0 went on without rank 1")
    except OutOfMemory as error:
        said = error.shortage.text
    dist.all_reduce(y)  # nothing is left over that this could be taken for
    return said, x.tolist() + y.tolist(), methods == dict(vars(dist.ProcessGroup))


@pytest.mark.distributed
def test_no_rank_enters_a_collective_that_a_full_rank_will_not_join() -> None:
    results = run_distributed_test(reduce_until_rank_1_is_full, 2, backend=None)
    assert results == [("rank 1: OutOfMemoryError: full", [8.0, 8.0, 8.0, 4.0, 4.0], True)] * 2


FEW = [("deepspeed", 0, "backward"), ("deepspeed", 2, "forward"), ("deepspeed", 3, "forward"), ("fsdp", 3, "backward")]
ALL = [
    (backend, stage, where)
    for backend, stage in [*(("deepspeed", stage) for stage in range(4)), *(("fsdp", stage) for stage in range(4))]
    for where in ("forward", "backward", "evaluation")
]


def train_with_a_full_rank(rank: int, world_size: int, folder: Path, layouts: list[tuple[str, int, str]]) -> None:
    for backend, stage, where in layouts:
        name = f"{backend}-{stage}-{where}"
        small = 8 if where == "evaluation" else 4
        trainer = train(folder / name, stage, 8, backend, limit=4 if rank == 1 else None, where=where)
        assert trainer.micro.sizes == BatchSizes(16, small, 8 // small, 2)
        assert trainer.micro.evaluation == 4
        if layouts == ALL:
            train(folder / f"{name}-small", stage, small, backend)


@pytest.mark.fault("out of memory on one of two ranks: {layouts}")
@pytest.mark.distributed
@pytest.mark.parametrize("layouts", [FEW, pytest.param(ALL, marks=pytest.mark.slow)], ids=["few", "all"])
def test_a_rank_that_runs_out_of_memory_takes_the_others_with_it(
    tmp_path: Path, layouts: list[tuple[str, int, str]]
) -> None:
    run_distributed_test(train_with_a_full_rank, 2, tmp_path, layouts, backend=None, timeout_s=400)
    train(tmp_path / "one", 0, 16, "deepspeed")
    for backend, stage, where in layouts:
        name = f"{backend}-{stage}-{where}"
        if layouts == ALL:
            assert losses(tmp_path / name) == losses(tmp_path / f"{name}-small")
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
        assert losses(tmp_path / name, "val") == pytest.approx(losses(tmp_path / "one", "val"), rel=1e-6)


def train_until_rank_1_is_full(rank: int, world_size: int, folder: Path, resume: str) -> None:
    config = config_of(folder / f"of {rank}", 2, 8, save_every=3)
    task = Hungry(config, 4 if rank == 1 else None, "backward", since=5)
    trainer = trainer_of(task, config, folder / "run", "deepspeed", resume)
    trainer.run()
    assert trainer.micro.sizes == BatchSizes(16, 4, 2, 2)


@pytest.mark.fault("out of memory on one of two ranks, in a later step: the run ends, and resumes")
@pytest.mark.distributed
def test_a_rank_that_is_full_later_ends_the_run_which_resumes_with_half_the_micro_batch(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"step 5 ran out of memory with 8.*rank 1.*the other ranks are in.*auto"):
        run_distributed_test(train_until_rank_1_is_full, 2, tmp_path, "none", backend=None)
    run_distributed_test(train_until_rank_1_is_full, 2, tmp_path, "auto", backend=None)
    train(tmp_path / "one", 0, 16, "deepspeed")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)


class Uneven(Hungry):
    """Its data set tells which samples are the large ones: those that step 2 is the first to hold."""

    def dataset(self, split: str) -> Rows:
        rows = super().dataset(split)
        large = GlobalBatches(len(rows), 16, 42).samples(2)
        rows.lengths = np.isin(np.arange(len(rows)), large).astype(np.int64)  # type: ignore[attr-defined]
        return rows


def train_with_a_late_large_batch(rank: int, world_size: int, folder: Path) -> None:
    config = config_of(folder / f"of {rank}", 2, 8)
    task = Uneven(config, 4 if rank == 1 else None, "backward", since=2)
    trainer = trainer_of(task, config, folder / "run", "deepspeed")
    trainer.run()
    assert trainer.micro.sizes == BatchSizes(16, 4, 2, 2)


@pytest.mark.fault("out of memory on one of two ranks, in a later step with larger samples than any before")
@pytest.mark.distributed
def test_a_batch_larger_than_any_before_is_made_with_care_again(tmp_path: Path) -> None:
    run_distributed_test(train_with_a_late_large_batch, 2, tmp_path, backend=None)
    train(tmp_path / "one", 0, 16, "deepspeed")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)


def train_under_a_limit(folder: Path, config: RunConfig, free_bytes: int) -> None:
    class Large(TinyTask):
        def loss(self, model: nn.Module, batch: Batch) -> Sums:
            if model.training:
                torch.empty(len(batch["x"]) * _SAMPLE_BYTES, dtype=torch.uint8)
            return super().loss(model, batch)

    trainer = Trainer(Large(config.data, config.model), config, start(), folder)
    limit = psutil.Process().memory_info().vms + free_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    trainer.run()


_SAMPLE_BYTES = 2**29


@pytest.mark.fault("the system refuses memory")
def test_memory_that_the_system_refuses(tmp_path: Path) -> None:
    """16 samples of half a GiB into 3 GiB of address space: 4 are the most."""
    config = config_of(tmp_path / "of", 2, 16)
    process = fork_server().Process(target=train_under_a_limit, args=(tmp_path / "run", config, 6 * _SAMPLE_BYTES))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert json.loads((tmp_path / "run/memory.json").read_text())["micro_batch_size"] == 4
    train(tmp_path / "small", 2, 4, "deepspeed")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "small"), rel=1e-6)


@pytest.mark.fault("out of memory in an evaluation")
def test_out_of_memory_in_an_evaluation_changes_neither_metrics_nor_training(tmp_path: Path) -> None:
    trainer = train(tmp_path / "broken", 2, 8, "deepspeed", limit=3, where="evaluation", since=4)
    assert (trainer.micro.sizes.micro_batch_size, trainer.micro.evaluation) == (8, 2)
    train(tmp_path / "unbroken", 2, 8, "deepspeed")
    assert losses(tmp_path / "broken") == losses(tmp_path / "unbroken")
    assert losses(tmp_path / "broken", "val") == pytest.approx(losses(tmp_path / "unbroken", "val"), rel=1e-6)
    assert [row["step"] for row in lines(tmp_path / "broken", "memory")] == [4, 4]


@pytest.mark.fault("one sample is too much")
def test_where_one_sample_does_not_fit_the_error_says_what_takes_the_memory_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TrunklineError) as caught:
        train(tmp_path / "run", 2, 2, "deepspeed", limit=0)
    said = str(caught.value)
    assert said.startswith("step 0 does not fit into memory with 1 sample (rank 0: OutOfMemoryError: CUDA out of")
    assert "counted are, a rank: parameters 964 B, gradients 964 B, master weights 964 B, optimizer 1.88 KiB" in said
    assert "Use training.activation_checkpointing, deepspeed.bf16, zero_optimization.offload_optimizer to" in said


class Stingy(torch.optim.AdamW):
    """Refuses after it has changed the first parameters, in its second step."""

    def step(self, closure: Any = None) -> Any:
        super().step()
        self.steps_made = getattr(self, "steps_made", 0) + 1
        if self.steps_made == 2 and sum(len(group["params"]) for group in self.param_groups) > 4:  # no trial of it
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.fault("out of memory in the optimizer's update")
def test_out_of_memory_in_an_update_ends_the_run_which_resumes_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, 0, 8, save_every=1)
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim, "AdamW", Stingy)
        with pytest.raises(TrunklineError, match=r"step 1 ran out .*the optimizer was changing.*--resume auto"):
            trainer_of(Hungry(config, None), config, tmp_path / "run", "fsdp").run()
    trainer_of(Hungry(config, None), config, tmp_path / "run", "fsdp", "auto").run()
    train(tmp_path / "unbroken", 0, 8, "fsdp")
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "unbroken"), rel=1e-6)


def test_a_resumed_run_starts_with_the_micro_batch_that_fitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, 2, 16, steps=4)
    trainer_of(Hungry(config, 4), config, tmp_path / "run", "deepspeed").run()
    capsys.readouterr()
    longer = config_of(tmp_path, 2, 16)
    trainer = trainer_of(Hungry(longer, 4), longer, tmp_path / "run", "deepspeed", "auto")
    assert trainer.micro.sizes == BatchSizes(16, 4, 4, 1)
    assert f"as {tmp_path}/run/memory.json remembers: step 0 ran out of memory with 8" in capsys.readouterr().out
    assert trainer.assembly.plan["micro_batch_size"] == 4
    other = config_of(tmp_path, 2, 8)  # a person has chosen again
    trainer = trainer_of(Hungry(other, 4), other, tmp_path / "run", "deepspeed", "auto")
    assert trainer.micro.sizes == BatchSizes(16, 8, 2, 1)


def test_an_odd_micro_batch_goes_to_the_largest_divisor_of_at_most_half(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, deepspeed={"train_batch_size": 60, "train_micro_batch_size_per_gpu": 15})
    task, ranks = TinyTask(config.data, config.model), Ranks(0, 1, 0, torch.device("cpu"))
    plan = make_plan(task, config, 1, task.build_model())
    micro = MicroBatches(tmp_path, BatchSizes(60, 15, 2, 2), {}, ranks)
    seen = []
    for step in itertools.count():
        try:
            micro.halve(step, Shortage("rank 0: full", agreed=True), plan)
        except TrunklineError:
            break
        seen.append((micro.sizes.micro_batch_size, micro.sizes.grad_accum_steps))
    assert seen == [(6, 5), (3, 10), (1, 30)]
