"""What the engine costs: its step against a bare loop on the same backend.

    run(arguments)   `python launchers/bench.py engine [--backend fsdp] [--bf16]`
    measure(tensors=150, pairs=200, ...)    the seconds of every pair of steps

Two models are made alike. One is driven by Trainer, whole: order of samples, weights, gradient norm, clipping, logging
every tenth step, progress bar. The other is driven over a plain DataLoader by the loop of DeepSpeed's own tutorial, or
by the one that PyTorch's documents write for fully_shard, with clipping and warm-up as the same section of the
configuration asks for them. Their steps take turns, so both of a pair are of the same moment of the same machine.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, Dataset

from trunkline.benchmarks.pairs import Ratio, ratio_of
from trunkline.engine.backends.model_options import blocks
from trunkline.engine.config.run_config import RunConfig, load_config
from trunkline.engine.config.strict import Strict
from trunkline.engine.errors import ConfigError
from trunkline.engine.ranks.distributed import Ranks, start, stop
from trunkline.engine.task import Batch, Sums, Task
from trunkline.engine.trainer import Trainer

LIMIT_RATIO = 1.01
LIMIT_SECONDS = 100e-6
_WARM_UP = 20


class OverheadData(Strict):
    """Random rows."""

    samples: int = 4096


class OverheadModel(Strict):
    """A chain of linear layers, each of two tensors."""

    tensors: int = 10
    width: int = 64


class Rows(Dataset[Any]):
    """`count` random rows of `width` values and their targets, fp32, held in memory."""

    def __init__(self, count: int, width: int) -> None:
        self.x, self.y = torch.randn(count, width), torch.randn(count, width)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Links(nn.Module):
    """Linear layers, added up: x + scale * linear(x)."""

    def __init__(self, depth: int, width: int, scale: float) -> None:
        super().__init__()
        self.layers, self.scale = nn.ModuleList(nn.Linear(width, width) for _ in range(depth)), scale

    def forward(self, x: Tensor) -> Tensor:
        """[B, width] -> [B, width]."""
        x = x.to(next(self.parameters()).dtype)
        for layer in self.layers:
            x = x + layer(x) * self.scale
        return x


class Chain(nn.Module):
    """Links of five layers, ten tensors: the blocks of a small transformer have as many."""

    _no_split_modules = ("Links",)

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.links = nn.Sequential(*(Links(min(5, depth - first), width, 1 / depth) for first in range(0, depth, 5)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, width] -> [B, width]."""
        return self.links(x)


class OverheadTask(Task):
    """Mean squared error of a chain: trunkline.engine.task.Task at its least."""

    def __init__(self, data: OverheadData, model: OverheadModel) -> None:
        self.model = model
        self._sets = {"train": Rows(data.samples, model.width), "val": Rows(8, model.width)}

    def build_model(self) -> nn.Module:
        return Chain(self.model.tensors // 2, self.model.width)

    def dataset(self, split: str) -> Rows:
        return self._sets[split]

    def collate(self, samples: Sequence[tuple[Tensor, Tensor]]) -> Batch:
        x, y = zip(*samples, strict=True)
        return {"x": torch.stack(x), "y": torch.stack(y)}

    def loss(self, model: nn.Module, batch: Batch) -> Sums:
        return {"loss": (squared_errors(model, batch).mean(1) * batch["valid"]).sum()}

    def flops_per_sample(self) -> float:
        return 6.0 * self.model.tensors / 2 * self.model.width**2

    def fingerprint(self) -> str:
        return "random"


def squared_errors(model: nn.Module, batch: Batch) -> Tensor:
    """[B, width]."""
    return (model(batch["x"]) - batch["y"]).square()


class _Interleaved(Trainer):
    """Trainer that lets a bare step follow each of its own. `pairs` holds the seconds of both."""

    bare_step: Callable[[], None]
    clock: Callable[[], float]

    def _micro_batches(self) -> Iterator[list[Batch]]:
        self.pairs: list[tuple[float, float]] = []
        micro_batches = super()._micro_batches()
        while True:
            begin = self._now()
            batches = next(micro_batches, None)
            if batches is None:
                return
            yield batches  # the trainer comes back for the next when this step is wholly done
            between = self._now()
            self.bare_step()
            self.pairs.append((between - begin, self._now() - between))

    def _now(self) -> float:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize()
        return self.clock()


def measure(
    *,
    tensors: int,
    pairs: int,
    stage: int,
    backend: str = "deepspeed",
    bf16: bool = False,
    batch_size: int = 32,
    clock: Callable[[], float] = time.perf_counter,
) -> list[tuple[float, float]]:
    """Seconds of a step of ours and of the bare loop, `pairs` of them, after a warm-up.

    Call it on one process, in the process group that `trunkline.engine.ranks.distributed.start` made.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = _config(Path(folder), tensors, pairs + _WARM_UP + 1, stage, batch_size, bf16)
        ranks = start()
        nowhere = open(os.devnull, "w")  # noqa: SIM115  # the progress bar and the lines are made, for nobody to read
        with nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            task = OverheadTask(config.data, config.model)
            trainer = _Interleaved(task, config, ranks, Path(folder, "run"), backend=backend)
            trainer.clock = clock
            trainer.bare_step = (_bare_fsdp_step if backend == "fsdp" else _bare_deepspeed_step)(task, config, ranks)
            gc.disable()  # a collection would fall into one step of a pair
            try:
                trainer.run()
            finally:
                gc.enable()
        return trainer.pairs[_WARM_UP:]


def _bare_deepspeed_step(task: OverheadTask, config: RunConfig, ranks: Ranks) -> Callable[[], None]:
    """The tutorial's loop, one step a call."""
    import deepspeed

    section, model = config.deepspeed, task.build_model()
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, **section.optimizer.params, fused=True),
        config={
            "train_batch_size": section.train_batch_size,
            "gradient_clipping": section.gradient_clipping,
            "bf16": {"enabled": section.bf16.enabled},
            "zero_optimization": {"stage": section.zero_optimization.stage},
            "zero_allow_untested_optimizer": True,
            "scheduler": section.scheduler.model_dump() if section.scheduler else None,
        },
        dist_init_required=False,
    )

    source = _bare_batches(task, config, ranks)

    def step() -> None:
        engine.backward(squared_errors(engine, next(source)).mean())
        engine.step()

    return step


def _bare_fsdp_step(task: OverheadTask, config: RunConfig, ranks: Ranks) -> Callable[[], None]:
    """The loop of PyTorch's documents for fully_shard, one step a call."""
    section, model = config.deepspeed, task.build_model()
    reshard = section.zero_optimization.stage == 3
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    narrow = torch.bfloat16 if section.bf16.enabled else None
    precision = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(model.parameters(), **section.optimizer.params, fused=True)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=_WARM_UP)
    source = _bare_batches(task, config, ranks)

    def step() -> None:
        squared_errors(model, next(source)).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), section.gradient_clipping)
        optimizer.step()
        warm_up.step()
        optimizer.zero_grad()

    return step


def _bare_batches(task: OverheadTask, config: RunConfig, ranks: Ranks) -> Iterator[Batch]:
    size = config.deepspeed.train_batch_size
    while True:
        for batch in DataLoader(task.dataset("train"), size, shuffle=True, collate_fn=task.collate):
            yield {key: value.to(ranks.device) for key, value in batch.items()}


def _config(folder: Path, tensors: int, steps: int, stage: int, batch_size: int, bf16: bool) -> RunConfig:
    never = steps + 1
    raw = {
        "workload": "overhead",
        "data": {},
        "model": {"tensors": tensors},
        "training": {
            "steps": steps,
            "eval_every": never,
            "save_every": never,
            "log_every": 10,
            "trackers": [],
            "parameters": [{"names": ["*"], "weight_decay": 0.01}],  # as in the loops beside it
        },
        "deepspeed": {
            "train_batch_size": batch_size,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.01}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": _WARM_UP}},
            "gradient_clipping": 1.0,
            "bf16": {"enabled": bf16},
            "zero_optimization": {"stage": stage},
        },
    }
    path = folder / "overhead.json"
    path.write_text(json.dumps(raw))
    return load_config(path, sections=lambda name: (OverheadData, OverheadModel))


@dataclass(frozen=True)
class Verdict:
    """Medians over the pairs."""

    ours_s: float
    bare_s: float
    ratio: Ratio
    difference_s: float

    @property
    def within_limit(self) -> bool:
        """At most 1 % or 100 microseconds a step."""
        return self.ratio.median <= LIMIT_RATIO or self.difference_s <= LIMIT_SECONDS


def judge(pairs: Sequence[tuple[float, float]]) -> Verdict:
    """The verdict on pairs of seconds (ours, bare)."""
    ours, bare = zip(*pairs, strict=True)
    return Verdict(
        ours_s=statistics.median(ours),
        bare_s=statistics.median(bare),
        ratio=ratio_of(ours, bare),
        difference_s=statistics.median(our - their for our, their in pairs),
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure and print a table. Returns 0 if every row is within the limit, else 1."""
    if arguments.pairs < 10 or min(arguments.tensors) < 2:
        raise ConfigError("use at least --pairs 10 and --tensors 2")
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    print(
        f"{arguments.backend}, {'bf16' if arguments.bf16 else 'fp32'}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads; medians of {arguments.pairs} pairs of steps"
    )
    print(f"{'tensors':>7} {'ZeRO':>4} {'bare ms':>9} {'ours ms':>9} {'ratio':>7} {'95 % interval':>15} {'more us':>9}")
    verdicts = []
    try:
        for tensors in arguments.tensors:
            for stage in arguments.stages:
                pairs = measure(
                    tensors=tensors, pairs=arguments.pairs, stage=stage, backend=arguments.backend, bf16=arguments.bf16,
                    clock=clock,
                )  # fmt: skip
                verdict = judge(pairs)
                verdicts.append(verdict)
                print(
                    f"{tensors:>7} {stage:>4} {verdict.bare_s * 1e3:>9.3f} {verdict.ours_s * 1e3:>9.3f} "
                    f"{verdict.ratio.median:>7.3f} {verdict.ratio.low:>7.3f}-{verdict.ratio.high:.3f} "
                    f"{verdict.difference_s * 1e6:>10.0f}  {'' if verdict.within_limit else 'over the limit'}",
                    flush=True,
                )
    finally:
        stop()
    within = sum(verdict.within_limit for verdict in verdicts)
    print(f"{within} of {len(verdicts)} within the limit: at most 1 % or 100 microseconds a step")
    return 0 if within == len(verdicts) else 1
