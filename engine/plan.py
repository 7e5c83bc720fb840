"""What a run would be, without training and without a GPU.

Resolved sizes, memory, steps and learning rates.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from trunkline.engine.config.deepspeed_section import (
    BatchSizes,
    batch_sizes,
    bucket_size,
    keeps_together,
    parameter_dtype,
)
from trunkline.engine.config.direction import with_direction
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.config.typed_params import ADAMW_SCALE
from trunkline.engine.data.order import GlobalBatches
from trunkline.engine.errors import ConfigError
from trunkline.engine.optim.optimizers import build_optimizer
from trunkline.engine.optim.parameter_rules import planned_rules, render_rules, tied_names
from trunkline.engine.optim.schedules import learning_rates, warmup_steps
from trunkline.engine.record.boards import unused_settings
from trunkline.engine.task import Task, lengths_of


def make_plan(
    task: Task, config: RunConfig, world_size: int, model: nn.Module, sizes: BatchSizes | None = None
) -> dict[str, Any]:
    """The plan of a run of `model` on `world_size` ranks, ready for JSON. Sizes are in bytes, a rank.

    `config` is ready (readiness.py). Batch sizes are the configured ones unless given. Activations are those that
    autograd keeps for one micro-batch, counted by running the loss on fake tensors, which have shapes but no memory;
    null where the model cannot run so.
    """
    config = with_direction(config, task)
    sizes = sizes or sizes_of(task, config, world_size)
    batches = planned_batches(task, config, world_size, sizes)
    steps = total_steps(config, batches)
    section = config.deepspeed
    peak = float(section.optimizer.params["lr"])
    ramp = warmup_steps(section.scheduler, steps)
    shown = sorted({0, min(1, steps - 1), min(ramp, steps - 1), steps - 1})
    led = None  # what only DeepSpeed builds is led as AdamW is
    if not section.optimizer.is_deepspeed_only:
        led = build_optimizer([nn.Parameter(torch.zeros(1))], section.optimizer)
    rates = learning_rates(section.scheduler, peak, steps, shown, led)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    activations = activation_bytes(task, model, config, sizes.micro_batch_size)
    states = _state_bytes(config, parameters, trainable, world_size)
    decided, origins = _decided(config, sizes, parameters)
    return {
        "workload": config.workload,
        "parameters": parameters,
        "trainable_parameters": trainable,
        "world_size": world_size,
        "global_batch_size": sizes.global_batch_size,
        "micro_batch_size": sizes.micro_batch_size,
        "grad_accum_steps": sizes.grad_accum_steps,
        "train_samples": batches.num_samples,
        "steps_per_epoch": batches.per_epoch,
        "steps": steps,
        "epochs": steps / batches.per_epoch,
        "in_steps": {key: config.in_force(key) for key in config.in_epochs},
        "learning_rate": {"step 0": rates[0], "step 1": rates[min(1, steps - 1)],
                          **({f"end of warm-up (step {ramp})": rates[ramp]} if ramp < steps else {}),
                          f"last (step {steps - 1})": rates[steps - 1]},
        "metric_units": dict(task.metric_units),
        "validation_loss": task.validation_loss,
        "parameter_rules": planned_rules(model, config, peak),
        "tied_parameters": tied_names(model, config),
        "memory_bytes": states | {"activations": activations},
        "checkpoint_bytes": _checkpoint_bytes(config, parameters, trainable),
        "flops_per_sample": task.flops_per_sample(),
        "config": decided,
        "origins": dict(sorted(origins.items())),
        "notes": [*unused_settings(config, task.tracking), *_endless_warmup(ramp, steps)],
    }  # fmt: skip


def _endless_warmup(ramp: int, steps: int) -> list[str]:
    if ramp < steps:
        return []
    return [
        f"the warm-up of deepspeed.scheduler takes {ramp} steps and the run {steps}, so the full learning rate is "
        "never reached: shorten it, or train for longer"
    ]


def _decided(config: RunConfig, sizes: BatchSizes, parameters: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The configuration of record with what ranks and model decide in place of "auto", and the origins of its keys."""
    shown, origins = config.as_dict(), dict(config.origins)
    section = shown["deepspeed"]
    zero, size = section["zero_optimization"], bucket_size(parameters)
    ranks = {
        "train_micro_batch_size_per_gpu": sizes.micro_batch_size,
        "gradient_accumulation_steps": sizes.grad_accum_steps,
    }
    for key in [key for key in ranks if section[key] == "auto"]:
        section[key], origins[f"deepspeed.{key}"] = ranks[key], "auto"
    left = {"reduce_bucket_size": size, "allgather_bucket_size": size, "overlap_comm": zero["stage"] == 3}
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
            f"{config.where(key)}: {key}: {micro} samples on each of {world_size} ranks are no multiple of the "
            f"{multiple} that belong together ({why}): use {ways}, or a divisor of {micro} for {why}"
        )
    return sizes


def planned_batches(task: Task, config: RunConfig, world_size: int, sizes: BatchSizes | None = None) -> GlobalBatches:
    """The global batches of a run on `world_size` ranks. Batch sizes are the configured ones unless given.

    Raises ConfigError, also where samples are to be grouped by length and do not say theirs.
    """
    size = (sizes or sizes_of(task, config, world_size)).global_batch_size
    dataset, key = task.dataset("train"), "training.group_by_length"
    lengths = lengths_of(dataset) if config.training.group_by_length else None
    if config.training.group_by_length and lengths is None:
        raise ConfigError(
            f"{config.where(key)}: {key}: the samples of {config.workload} do not differ in length (no "
            f"{type(dataset).__name__}.lengths): set it to false"
        )
    return GlobalBatches(len(dataset), size, config.training.seed, lengths)


def total_steps(config: RunConfig, batches: GlobalBatches) -> int:
    """The number of optimizer steps of a run. Raises ConfigError if there are no samples."""
    if not batches.num_samples:
        raise ConfigError(f"{config.source}: data: the training split has no samples")
    settings = config.training
    return settings.steps if settings.steps is not None else settings.epochs * batches.per_epoch  # type: ignore[operator]


def render_plan(plan: dict[str, Any]) -> str:
    """The plan for a person to read: the summary, then every value of the configuration with its origin."""
    values = dict(_flat(plan["config"]))
    width = max(len(key) for key in values)
    lines = [f"{key:<{width}}  {value!s:<40}  ({plan['origins'].get(key, 'default')})" for key, value in values.items()]
    return "\n".join([render_summary(plan), "", *lines])


def render_summary(plan: dict[str, Any]) -> str:
    """What a run is, in a few lines."""
    memory = plan["memory_bytes"]
    known = [value for value in memory.values() if value is not None]
    in_steps = plan["in_steps"]
    frozen = plan["parameters"] - plan["trainable_parameters"]
    relative = plan["config"]["deepspeed"]["optimizer"]["type"].lower() == ADAMW_SCALE.lower()
    lines = [
        f"{plan['workload']}: {plan['parameters']:,} parameters, {plan['trainable_parameters']:,} of them trained"
        + (f", {frozen:,} frozen" if frozen else ""),
        f"batch       {plan['global_batch_size']} = {plan['micro_batch_size']} a micro-batch x {plan['world_size']} "
        f"ranks x {plan['grad_accum_steps']} accumulation steps",
        f"steps       {plan['steps']:,} = {plan['epochs']:.4g} epochs of {plan['steps_per_epoch']:,} "
        f"({plan['train_samples']:,} samples)",
        *(["in steps    " + ", ".join(f"{key} {steps}" for key, steps in in_steps.items())] if in_steps else []),
        "lr          "
        + ", ".join(f"{name} {rate:.3g}" for name, rate in plan["learning_rate"].items())
        + relative * ", each times the root mean square of the parameter",
        f"memory      {readable_size(sum(known))} a rank: "
        + ", ".join(f"{name} {'unknown' if value is None else readable_size(value)}" for name, value in memory.items()),
        f"checkpoint  {readable_size(plan['checkpoint_bytes'])} in all",
        *render_rules(plan["parameter_rules"], plan["tied_parameters"]),
        *(f"note: {line}" for line in plan["notes"]),
    ]
    return "\n".join(lines)


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, item in value.items():
        pairs += _flat(item, f"{prefix}{key}.") if isinstance(item, dict) and item else [(f"{prefix}{key}", item)]
    return pairs


def readable_size(count: float) -> str:
    """Bytes for a person to read."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def _parameter_bytes(config: RunConfig) -> int:
    return parameter_dtype(config.deepspeed).itemsize


def _optimizer_bytes_a_parameter(config: RunConfig) -> float:
    """What the optimizer keeps for a parameter, from one step of it on a small one."""
    if config.deepspeed.optimizer.is_deepspeed_only:
        return 4.0 if config.deepspeed.optimizer.type.lower() in ("lion", "muon") else 8.0
    probe = nn.Parameter(torch.zeros(64, 64))
    optimizer = build_optimizer([probe], config.deepspeed.optimizer)
    probe.grad = torch.ones_like(probe)
    optimizer.step()
    state = optimizer.state[probe].values()
    return sum(value.numel() * value.element_size() for value in state if torch.is_tensor(value)) / probe.numel()


def _state_bytes(config: RunConfig, parameters: int, trainable: int, world_size: int) -> dict[str, int]:
    """Parameters, gradients, fp32 master weights and optimizer states of one rank under the ZeRO stage."""
    zero, width = config.deepspeed.zero_optimization, _parameter_bytes(config)
    shards = [world_size if zero.stage >= stage else 1 for stage in (3, 2, 1)]
    optimizer_on_device = 0 if zero.offload_optimizer is not None and zero.offload_optimizer.device == "cpu" else 1
    # ZeRO keeps a master copy in fp32 even of fp32 parameters, in the flat partitions that it updates
    master = 4 * trainable if width == 2 or zero.stage in (1, 2, 3) else 0
    average = {"average": math.ceil(4 * trainable / shards[2]) * optimizer_on_device} if config.training.ema else {}
    return {
        "parameters": math.ceil(width * parameters / shards[0]),
        "gradients": math.ceil(width * trainable / shards[1]),
        "master weights": math.ceil(master / shards[2]) * optimizer_on_device,
        "optimizer": math.ceil(_optimizer_bytes_a_parameter(config) * trainable / shards[2]) * optimizer_on_device,
    } | average


def _checkpoint_bytes(config: RunConfig, parameters: int, trainable: int) -> int:
    """All files of one checkpoint over all ranks: every value once, in fp32, with what the optimizer keeps for it."""
    frozen = _parameter_bytes(config) * (parameters - trainable)
    average = 4 if config.training.ema else 0
    return round(frozen + (4 + average + _optimizer_bytes_a_parameter(config)) * trainable)


def activation_bytes(task: Task, model: nn.Module, config: RunConfig, micro_batch_size: int) -> int | None:
    """What autograd keeps for one micro-batch, nothing recomputed; None where the model cannot run on fake tensors."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    batch = task.collate([task.dataset("train")[0]] * micro_batch_size)
    batch["valid"] = torch.ones(micro_batch_size, dtype=torch.bool)
    batch["draw"] = torch.zeros(micro_batch_size, dtype=torch.int64)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:  # a task may hold tensors too
            faked = _Faked(model, mode, parameter_dtype(config.deepspeed))
            own = {tensor.untyped_storage()._cdata for tensor in faked.tensors.values()}
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = task.loss(faked, {key: mode.from_tensor(value) for key, value in batch.items()})["loss"]
            del loss
    except Exception:  # a model may do what fake tensors cannot; the rest of the plan stands without this figure
        return None
    return sum(kept.values())


class _Faked(nn.Module):
    """A model run with fake parameters and buffers in place of its own, which stay untouched."""

    def __init__(self, model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype) -> None:
        super().__init__()
        self.__dict__["model"] = model  # not a submodule: its real parameters are not this module's
        self.__dict__["tensors"] = {name: mode.from_tensor(tensor.cpu()) for name, tensor in model.named_buffers()}
        for name, parameter in model.named_parameters():
            fake = torch.empty(parameter.shape, dtype=dtype)  # made inside the mode, so it takes no memory
            self.tensors[name] = fake.requires_grad_(parameter.requires_grad)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.__dict__["model"], self.tensors, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)
