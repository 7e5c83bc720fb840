"""What a run would be, without training and without a GPU.

Resolved sizes, memory, steps and learning rates.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, overload

import torch
from torch import nn

from trunkline.engine.config.deepspeed_section import (
    BatchSizes,
    batch_sizes,
    bucket_size,
    gathers_gradients,
    keeps_together,
    parameter_dtype,
)
from trunkline.engine.config.direction import with_direction
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.data.order import GlobalBatches, lengths_of
from trunkline.engine.errors import ConfigError, MissingDataError
from trunkline.engine.optim.optimizers import build_optimizer
from trunkline.engine.optim.parameter_rules import planned_rules, tied_names
from trunkline.engine.optim.schedules import learning_rates, warmup_steps
from trunkline.engine.planned_memory import activation_bytes, checkpoint_bytes, state_bytes
from trunkline.engine.record.boards import unused_settings
from trunkline.engine.task import Task

_FEW_STEPS = 100
"""A run of fewer is told so."""
_MAX_BATCH_PER_SAMPLES = 1000
"""A global batch may be at most so many times the training samples; the rest of it would be fillers."""


def make_plan(
    task: Task,
    config: RunConfig,
    world_size: int,
    model: nn.Module | MissingDataError,
    sizes: BatchSizes | None = None,
    samples: int | None = None,
    backend: str = "deepspeed",
) -> dict[str, Any]:
    """The plan of a run of `model` on `world_size` ranks, ready for JSON. Sizes are in bytes, a rank.

    `config` is ready (readiness.py). Batch sizes are the configured ones unless given. Activations are those that
    autograd keeps for one micro-batch, counted by running the loss on fake tensors, which have shapes but no memory;
    null where the model cannot run so. In 16 bits RMS norms are counted as a GPU keeps them, on a machine without one
    too.

    Where there are no data, figures that depend on them are null, and "unknown" says why. `samples` stands in for the
    number of training samples, and an error for a model that cannot be built without data.
    """
    config = with_direction(config, task)
    sizes = sizes or sizes_of(task, config, world_size)
    unknown: dict[str, str] = {}
    course, notes = _course(task, config, world_size, sizes, samples, unknown)
    weights = _weights(task, config, world_size, sizes, model, unknown)
    decided, origins = _decided(config, sizes, weights["parameters"], backend)
    return {
        "workload": config.workload,
        "world_size": world_size,
        "global_batch_size": sizes.global_batch_size,
        "micro_batch_size": sizes.micro_batch_size,
        "grad_accum_steps": sizes.grad_accum_steps,
        **course,
        **weights,
        "metric_units": dict(task.metric_units),
        "validation_loss": task.validation_loss,
        "config": decided,
        "origins": dict(sorted(origins.items())),
        "notes": [*unused_settings(config, task.tracking), *task.assumed, *notes, *config.notes],
        "unknown": unknown,
    }


def _course(
    task: Task, config: RunConfig, world_size: int, sizes: BatchSizes, samples: int | None, unknown: dict[str, str]
) -> tuple[dict[str, Any], list[str]]:
    """Samples, steps and learning rates, and what to say of them."""
    batches, why = None, ""
    try:
        batches = planned_batches(task, config, world_size, sizes, samples)
    except MissingDataError as error:
        why = str(error)
    steps = total_steps(config, batches)
    rates, notes = None, list[str]()
    if steps is not None and not any(key.startswith("deepspeed.scheduler") for key in lengths_in_epochs(config)):
        rates, ramp = _rates(config, steps)
        notes += _endless_warmup(ramp, steps)
    if steps is not None and steps < _FEW_STEPS:
        notes.append(_few_steps(config, steps, batches))
    if batches is None:
        unknown[f"{'steps' if steps is None else 'epochs'}{' and learning rates' * (rates is None)}"] = why
    return {
        "train_samples": batches and batches.num_samples,
        "steps_per_epoch": batches and batches.per_epoch,
        "steps": steps,
        "epochs": steps / batches.per_epoch if batches and steps is not None else config.training.epochs,
        "in_steps": {key: config.in_force(key) for key in config.in_epochs},
        "learning_rate": rates,
    }, notes


def _rates(config: RunConfig, steps: int) -> tuple[dict[str, float], int]:
    """The learning rate at the steps that tell most, and where the warm-up ends."""
    section = config.deepspeed
    ramp = warmup_steps(section.scheduler, steps)
    shown = sorted({0, min(1, steps - 1), min(ramp, steps - 1), steps - 1})
    led = None  # what only DeepSpeed builds is led as AdamW is
    if not section.optimizer.is_deepspeed_only:
        led = build_optimizer([nn.Parameter(torch.zeros(1))], section.optimizer)
    rates = learning_rates(section.scheduler, float(section.optimizer.params["lr"]), steps, shown, led)
    return {
        "step 0": rates[0], "step 1": rates[min(1, steps - 1)],
        **({f"end of warm-up (step {ramp})": rates[ramp]} if ramp < steps else {}),
        f"last (step {steps - 1})": rates[steps - 1],
    }, ramp  # fmt: skip


def _weights(
    task: Task, config: RunConfig, world_size: int, sizes: BatchSizes, model: nn.Module | MissingDataError,
    unknown: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """What follows from the model's shape."""
    flops = None
    with suppress(MissingDataError):
        flops = task.flops_per_sample()
    if isinstance(model, MissingDataError):
        unknown["parameters, memory and checkpoint"] = str(model)
        names = ("parameters", "trainable_parameters", "parameter_rules", "tied_parameters", "memory_bytes")
        return dict.fromkeys((*names, "checkpoint_bytes")) | {"flops_per_sample": flops}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    activations = None
    try:
        gpu = torch.cuda.is_available() or parameter_dtype(config.deepspeed) != torch.float32
        activations = activation_bytes(task, model, config, sizes.micro_batch_size, gpu)
    except MissingDataError as error:
        unknown["memory of activations"] = str(error)
    return {
        "parameters": parameters,
        "trainable_parameters": trainable,
        "parameter_rules": planned_rules(model, config, float(config.deepspeed.optimizer.params["lr"])),
        "tied_parameters": tied_names(model, config),
        "memory_bytes": state_bytes(config, parameters, trainable, world_size) | {"activations": activations},
        "checkpoint_bytes": checkpoint_bytes(config, parameters, trainable),
        "flops_per_sample": flops,
    }


def _few_steps(config: RunConfig, steps: int, batches: GlobalBatches | None) -> str:
    """That a run is very short, and how it would be longer."""
    ways = f"raise training.steps to {_FEW_STEPS} or more"
    if config.training.epochs is not None and batches is not None:
        longer = -(-_FEW_STEPS // batches.per_epoch)
        ways = "lower deepspeed.train_batch_size, or raise training.epochs "
        ways += f"({longer} are {longer * batches.per_epoch} steps)"
    counted = f"{steps} steps"
    if batches is not None:
        counted = (
            f"{batches.num_samples:,} samples at batch {batches.global_batch_size} are {batches.per_epoch:,} steps an "
            f"epoch, {steps} in all"
        )
    return f"{counted}: few models learn much in fewer than {_FEW_STEPS} steps. To train for longer, {ways}"


def _endless_warmup(ramp: int, steps: int) -> list[str]:
    if ramp < steps:
        return []
    return [
        f"the warm-up of deepspeed.scheduler takes {ramp} steps and the run {steps}, so the full learning rate is "
        "never reached: shorten it, or train for longer"
    ]


def _decided(
    config: RunConfig, sizes: BatchSizes, parameters: int | None, backend: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """The configuration of record with what ranks and model decide in place of "auto", and the origins of its keys."""
    shown, origins = config.as_dict(), dict(config.origins)
    section = shown["deepspeed"]
    zero, size = section["zero_optimization"], "auto" if parameters is None else bucket_size(parameters)
    ranks = {
        "train_micro_batch_size_per_gpu": sizes.micro_batch_size,
        "gradient_accumulation_steps": sizes.grad_accum_steps,
    }
    for key in [key for key in ranks if section[key] == "auto"]:
        section[key], origins[f"deepspeed.{key}"] = ranks[key], "auto"
    if backend != "deepspeed":  # FSDP has no such buffers
        return shown, origins
    left = {"reduce_bucket_size": size, "allgather_bucket_size": size, "overlap_comm": zero["stage"] == 3}
    left["contiguous_gradients"] = gathers_gradients(config.deepspeed, sizes.world_size)
    zero |= {key: left[key] for key in left if origins.get(f"deepspeed.zero_optimization.{key}") == "auto"}
    return shown, origins


def sizes_of(task: Task, config: RunConfig, world_size: int) -> BatchSizes:
    """The batch sizes as configured. Raises ConfigError where they tear apart what belongs together."""
    sizes, multiple = batch_sizes(config.deepspeed, world_size), task.micro_batch_multiple
    if not keeps_together(sizes, multiple):
        key, micro, total = "deepspeed.train_micro_batch_size_per_gpu", sizes.micro_batch_size, sizes.global_batch_size
        why = task.micro_batch_multiple_key or f"{type(task).__name__}.micro_batch_multiple"
        ways = f"a multiple of {world_size * multiple} for deepspeed.train_batch_size ({total})"
        if total % (world_size * multiple) == 0:
            ways = f'a multiple of {multiple}, or "auto", for it'
        raise ConfigError(
            f"{key}: {micro} samples on each of {world_size} ranks are no multiple of the "
            f"{multiple} that belong together ({why}): use {ways}, or a divisor of {micro} for {why}"
        )
    return sizes


def planned_batches(
    task: Task, config: RunConfig, world_size: int, sizes: BatchSizes | None = None, samples: int | None = None
) -> GlobalBatches:
    """The global batches of a run on `world_size` ranks. Batch sizes are the configured ones unless given.

    `samples` stands in for the training samples, of which then nothing is read. Raises ConfigError, also where there
    are hardly any beside the size of a batch, or where they are to be grouped by length and do not say theirs.
    """
    size = (sizes or sizes_of(task, config, world_size)).global_batch_size
    lengths = None
    if samples is None:
        dataset, key = task.dataset("train"), "training.group_by_length"
        samples = len(dataset)
        lengths = lengths_of(dataset) if config.training.group_by_length else None
        if config.training.group_by_length and lengths is None:
            raise ConfigError(
                f"{key}: the samples of {config.workload} do not differ in length (no "
                f"{type(dataset).__name__}.lengths): set it to false"
            )
    if samples and size > _MAX_BATCH_PER_SAMPLES * samples:
        raise ConfigError(
            f"deepspeed.train_batch_size: {size} samples, where the training split has {samples}; at most "
            f"{_MAX_BATCH_PER_SAMPLES:,} times as many are taken: use {_fewer(task, config, world_size, samples)}"
        )
    return GlobalBatches(samples, size, config.training.seed, lengths)


def _fewer(task: Task, config: RunConfig, world_size: int, samples: int) -> str:
    """A global batch of about as many samples as there are that the ranks can share, if one is small enough."""
    section = config.deepspeed
    micro, steps = section.train_micro_batch_size_per_gpu, section.gradient_accumulation_steps
    least = world_size * (task.micro_batch_multiple if micro == "auto" else micro) * (1 if steps == "auto" else steps)
    size = max(samples // least, 1) * least
    return str(size) if size <= _MAX_BATCH_PER_SAMPLES * samples else "less, in fewer or smaller micro-batches"


@overload
def total_steps(config: RunConfig, batches: GlobalBatches) -> int: ...
@overload
def total_steps(config: RunConfig, batches: GlobalBatches | None) -> int | None: ...
def total_steps(config: RunConfig, batches: GlobalBatches | None) -> int | None:
    """The number of optimizer steps of a run; None where only samples that are not known decide it.

    Raises ConfigError if there are no samples.
    """
    if batches is not None and not batches.num_samples:
        raise ConfigError("data: the training split has no samples")
    settings = config.training
    if settings.steps is not None or batches is None:
        return settings.steps
    assert settings.epochs is not None
    return settings.epochs * batches.per_epoch


def lengths_in_epochs(config: RunConfig) -> list[str]:
    """The dotted keys that still hold epochs in place of steps."""
    return list(config.in_steps(1).in_epochs.keys() - config.in_epochs.keys())
