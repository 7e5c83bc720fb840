"""A training step of the fluid surrogate: the engine's, and a plain loop's, with our attention and with torch's.

    run(arguments)   `python launchers/bench.py training [--config configs/fluid/large.json]`

The network, its first weights, its micro-batches and AdamW are the same everywhere; data are random, of the reference
network's V = 6,712 variables, and what is to be predicted is what is seen. The engine is its Trainer's step, as
configured: bf16 weights with fp32 masters, its checks and its clipping. The plain loop is what PyTorch's documents
write: fp32 weights under bf16 autocast, clipping, the fused AdamW, and no look at a loss that would make a GPU wait. A
rate is shown only where loss and gradient norm of the first step are those of the plain loop with torch's attention.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from trunkline.benchmarks import contenders
from trunkline.benchmarks.report import OK, OUT_OF_TIME, Deadline, Report, Row, first_line, matmul_flops, the_device
from trunkline.engine.backends.model_options import apply_options
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.data.loading import training_loader
from trunkline.engine.data.randomness import seed_torch
from trunkline.engine.errors import ConfigError
from trunkline.engine.evaluation import to_device
from trunkline.engine.machine.hardware import GIB, peak_memory, reset_peak_memory
from trunkline.engine.plan import planned_batches, sizes_of
from trunkline.engine.ranks.distributed import start, stop
from trunkline.engine.task import Batch
from trunkline.engine.trainer import Trainer
from trunkline.kernels.attention import flash_attention
from trunkline.launchers.api import load_config
from trunkline.models.fluid import network
from trunkline.models.fluid.config import FluidData, FluidModel
from trunkline.models.fluid.data import Sample
from trunkline.models.fluid.normalization import Normalization
from trunkline.models.fluid.schema import GROUPS, Schema
from trunkline.models.fluid.task import FluidTask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCE_BOUNDARY, REFERENCE_STATES = 538, 6174
_SAME_LOSS, _SAME_NORM = 0.02, 0.05
_WARM_UP = 2
_REFERENCE = "plain loop, SDPA in slices"

Attention = Callable[..., Tensor]


class Contender(NamedTuple):
    """What makes a step: the engine's backend, or a plain loop if there is none, with an attention."""

    backend: str | None
    attention: Callable[[int, int, torch.device], Attention] | None = None
    compiled: bool = False


@dataclass
class Measured:
    """Seconds of each step that counts, the first step's loss and gradient norm; GiB of the GPU that it took at most,
    or that the process has on a CPU."""

    seconds: list[float] = field(default_factory=list)
    loss: float = 0.0
    grad_norm: float = 0.0
    peak_gib: float = 0.0


class RandomMinutes(FluidTask):
    """The fluid task over random minutes in memory; what is to be predicted is the state that is seen."""

    def __init__(self, data: FluidData, model: FluidModel, boundary: int, states: int, count: int) -> None:
        self.data, self.model, self._count = data, model, count
        names = {group: tuple(f"P_{n}_p_in" for n in range(states)) if group == "P" else () for group in GROUPS}
        self.schema = Schema(tuple(f"B_{n}:SP" for n in range(boundary)), names)
        self.normalization = Normalization(boundary, states)

    def dataset(self, split: str) -> list[Sample]:  # type: ignore[override]  # samples are all that it has to be
        generator, shape = np.random.default_rng(0), (self.data.history, self.schema.num_variables)
        xs = [generator.standard_normal(shape, dtype=np.float32) for _ in range(self._count if split == "train" else 1)]
        return [(x, x[:, self.schema.num_boundary :].copy(), np.float32(1)) for x in xs]

    def fingerprint(self) -> str:
        return "random"

    def save_assets(self, folder: Path) -> dict[str, Any]:
        return {}


class _Clock:
    """Seconds between marks. On a GPU they are those of the device, which no mark makes wait."""

    def __init__(self, device: torch.device) -> None:
        self._cuda, self._marks = device.type == "cuda", list[Any]()

    def mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        pairs = list(zip(self._marks, self._marks[1:]))
        if not self._cuda:
            return [after - before for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) * 1e-3 for before, after in pairs]


def run(arguments: argparse.Namespace) -> int:
    """Train, print and write. Returns the exit status."""
    deadline, device = Deadline(arguments.minutes), the_device()
    path = arguments.config or Path("configs/fluid/nano.json" if arguments.quick else "configs/fluid/large.json")
    micro_batch, boundary, states = arguments.micro_batch, REFERENCE_BOUNDARY, REFERENCE_STATES
    if arguments.quick:
        micro_batch, boundary, states = 2, 8, 56
    chosen = [name for name in CONTENDERS if all(word in name for word in arguments.only)]
    if not chosen:
        raise ConfigError(f"--only {' '.join(arguments.only)}: no name has all of it: {'; '.join(CONTENDERS)}")
    chosen = [
        name for name in CONTENDERS if name in chosen or name == _REFERENCE
    ]  # which says whether others are right
    config = _config(path, micro_batch, _WARM_UP + arguments.steps, device)
    if config.model.tokens != "scalar" or config.model.linear_skip:
        raise ConfigError(f'{path}: the data here are random scalars: use tokens "scalar" and no linear_skip')
    task = RandomMinutes(config.data, config.model, boundary, states, config.training.steps * micro_batch)
    flops = micro_batch * task.flops_per_sample()
    tokens = micro_batch * config.data.history * task.schema.num_variables
    report = Report(
        "-".join(["training", *arguments.only]).replace(" ", "-"),
        "A training step of the fluid surrogate",
        device,
        arguments.out,
    )
    matmul = matmul_flops(device)
    report.notes += [
        f"{path}: {sum(p.numel() for p in task.build_model().parameters()):,} parameters, {micro_batch} samples of "
        f"{config.data.history} x {task.schema.num_variables:,} tokens a step, {'bf16' if _bf16(config) else 'fp32'}, "
        f"ZeRO {config.deepspeed.zero_optimization.stage}; medians of {arguments.steps} steps after {_WARM_UP}.",
        f"A step is {flops / 1e12:.4g} TFLOP of the model: 2 a weight and token, and 4 a channel, query and key that "
        "it sees, three times for forward and backward; what is computed again does not count.",
        f"A matrix product of the device itself: {matmul / 1e12:.4g} TFLOP/s.",
    ]
    rows = {
        name: report.add(
            contender=name, median_s=None, fastest_s=None, slowest_s=None, tokens_per_s=None, tflop_per_s=None,
            of_matmul=None, peak_gib=None, first_loss=None, first_grad_norm=None, status=OUT_OF_TIME,
        )
        for name in chosen
    }  # fmt: skip

    def fill_in(name: str) -> None:
        try:
            measured = _measure(CONTENDERS[name], task, config, device)
        except Exception as error:  # the row names it
            traceback.print_exc(file=sys.stderr)
            rows[name]["status"] = f"not run: {first_line(error)}"
            return
        finally:
            _free(device)
        median = statistics.median(measured.seconds)
        rows[name] |= {
            "median_s": median, "fastest_s": min(measured.seconds), "slowest_s": max(measured.seconds),
            "tokens_per_s": tokens / median, "tflop_per_s": flops / median / 1e12, "of_matmul": flops / median / matmul,
            "peak_gib": measured.peak_gib, "first_loss": measured.loss,
            "first_grad_norm": measured.grad_norm, "status": OK,
        }  # fmt: skip
        print(", ".join(f"{key} {value}" for key, value in rows[name].items() if value is not None), flush=True)
        _compare(list(rows.values()))

    try:
        report.measure(chosen, fill_in, deadline)
    finally:
        stop()
    return report.write(_draw)


def _compare(rows: list[Row]) -> None:
    """Take back the rates of what does not begin as the plain loop with torch's own attention does."""
    reference = next((row for row in rows if row["contender"] == _REFERENCE and row["status"] == OK), None)
    for row in rows:
        if reference is None or row["status"] != OK:
            continue
        for key, limit in (("first_loss", _SAME_LOSS), ("first_grad_norm", _SAME_NORM)):
            if not abs(row[key] - reference[key]) <= limit * reference[key]:
                row |= dict.fromkeys(_RATES) | {"status": f"wrong: {key} {row[key]:.5g}, not {reference[key]:.5g}"}
                break


_RATES = ("median_s", "fastest_s", "slowest_s", "tokens_per_s", "tflop_per_s", "of_matmul")


def _config(path: Path, micro_batch: int, steps: int, device: torch.device) -> RunConfig:
    """The file's run, so long, with neither evaluation nor save."""
    never = steps + 1
    return load_config(
        path,
        {
            "training.epochs": None, "training.steps": steps, "training.eval_every": never,
            "training.save_every": never, "training.log_every": 1, "training.trackers": [],
            "deepspeed.train_batch_size": micro_batch, "deepspeed.train_micro_batch_size_per_gpu": micro_batch,
            "deepspeed.bf16.enabled": device.type == "cuda",
        },
    )  # fmt: skip


def _bf16(config: RunConfig) -> bool:
    return config.deepspeed.bf16.enabled


def _measure(contender: Contender, task: RandomMinutes, config: RunConfig, device: torch.device) -> Measured:
    reset_peak_memory(device)
    held = torch.cuda.memory_allocated() / GIB if device.type == "cuda" else 0.0
    if contender.compiled:
        config = replace(config, training=config.training.model_copy(update={"compile": True}))
    attention = contender.attention
    attend = flash_attention if attention is None else attention(config.data.history, task.schema.num_variables, device)
    before = network.flash_attention
    network.flash_attention = attend
    try:
        side = _plain if contender.backend is None else partial(_engine, contender.backend)
        measured = side(task, config, device)
    finally:
        network.flash_attention = before
    measured.peak_gib -= held
    return measured


def _engine(backend: str, task: RandomMinutes, config: RunConfig, device: torch.device) -> Measured:
    """Steps of the engine, over its own batches."""
    measured, clock = Measured(), _Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            trainer = Trainer(task, config, start(), Path(folder, "run"), backend=backend)
        try:
            for step, micro_batches in enumerate(trainer._micro_batches()):
                made = trainer.stepper.make(micro_batches)
                if made is None:
                    raise RuntimeError("out of memory")
                if step == 0:
                    values = trainer.stepper.values(made)
                    measured.loss, measured.grad_norm = values["loss"], values["grad_norm"]
                if step + 1 >= _WARM_UP:
                    clock.mark()
            measured.seconds, measured.peak_gib = clock.seconds(), peak_memory(device)  # which `close` begins anew
        finally:
            trainer.close()
    return measured


def _plain(task: RandomMinutes, config: RunConfig, device: torch.device) -> Measured:
    """Steps of a loop as one writes it, over the same batches."""
    measured, clock, section = Measured(), _Clock(device), config.deepspeed
    seed_torch(config.training.seed, 0)
    model = apply_options(task.build_model().to(device), config.training).train()
    params = section.optimizer.params
    optimizer = torch.optim.AdamW(model.parameters(), **(params | {"betas": tuple(params["betas"])}), fused=True)
    for step, batch in enumerate(_batches(task, config, device)):
        batch = to_device(batch, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=_bf16(config)):
            loss = task.loss(model, batch)["loss"] / task.weight(batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), section.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            measured.loss, measured.grad_norm = loss.item(), norm.item()
        if step + 1 >= _WARM_UP:
            clock.mark()
    measured.seconds, measured.peak_gib = clock.seconds(), peak_memory(device)
    return measured


def _batches(task: RandomMinutes, config: RunConfig, device: torch.device) -> Iterator[Batch]:
    steps = config.training.steps
    assert steps is not None
    for micro_batches in training_loader(
        task, task.dataset("train"), planned_batches(task, config, 1), sizes_of(task, config, 1), 0, first_step=0,
        last_step=steps, num_workers=config.training.num_workers, pin_memory=device.type == "cuda",
    ):  # fmt: skip
        yield micro_batches[0]


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _slices(minutes: int, variables: int, device: torch.device) -> Attention:
    return _called_as_ours(contenders.slices(variables, None))


def _only(backend: SDPBackend) -> Callable[[int, int, torch.device], Attention]:
    def make(minutes: int, variables: int, device: torch.device) -> Attention:
        if device.type != "cuda":
            raise RuntimeError("needs a CUDA device")
        return _called_as_ours(contenders.under(backend, contenders.slices(variables, None)))

    return make


def _flex(minutes: int, variables: int, device: torch.device) -> Attention:
    return _called_as_ours(contenders.flex(minutes * variables, variables, None, device))


def _called_as_ours(attend: contenders.Attention) -> Attention:
    return lambda q, k, v, *, causal_block: attend(q, k, v)


CONTENDERS = {
    "ours, DeepSpeed": Contender("deepspeed"),
    _REFERENCE: Contender(None, _slices),
    "plain loop, our attention": Contender(None),
    "ours, FSDP": Contender("fsdp"),
    "plain loop, cuDNN in slices": Contender(None, _only(SDPBackend.CUDNN_ATTENTION)),
    "plain loop, FlashAttention 2 in slices": Contender(None, _only(SDPBackend.FLASH_ATTENTION)),
    "ours, DeepSpeed, compiled": Contender("deepspeed", compiled=True),
    f"{_REFERENCE}, compiled": Contender(None, _slices, compiled=True),
    "plain loop, our attention, compiled": Contender(None, compiled=True),
    "ours, FSDP, compiled": Contender("fsdp", compiled=True),
    "plain loop, FlexAttention": Contender(None, _flex),
}
"""By name, what matters most first."""


def _draw(rows: list[Row]) -> Figure:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.45 * len(rows) + 1.4), layout="constrained")
    axes.barh([row["contender"] for row in rows][::-1], [row["tokens_per_s"] for row in rows][::-1])
    axes.set(xlabel="tokens a second")
    return figure
