"""Checks of a configuration that need the run's length, ranks and backend.

They come before anything is built.

config = ready(config, "deepspeed", total_steps, world_size, device)     "auto" decided, faults named
check_backend(config, "fsdp", world_size)                                those of them that need no length
"""

from __future__ import annotations

from dataclasses import replace

import torch

from trunkline.engine.config.deepspeed_section import DeepSpeedSection
from trunkline.engine.config.fsdp_section import check_fsdp_section
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.errors import ConfigError
from trunkline.engine.machine.hardware import has_bf16_units
from trunkline.engine.optim.extensions import check_compiler
from trunkline.engine.optim.optimizer_probe import check_optimizer
from trunkline.engine.optim.schedules import check_length, decided


def ready(config: RunConfig, backend: str, total_steps: int, world_size: int, device: torch.device) -> RunConfig:
    """The configuration with a value for each "auto" that the number of steps decides.

    Raises ConfigError for a schedule that does not fit the run, an optimizer that could not be saved, split or resumed,
    or built, and for what the backend does not do.
    """
    check_backend(config, backend, world_size)
    config = _with_schedule(config, total_steps)
    check_optimizer(config.deepspeed, backend, total_steps, device)
    check_compiler(config.deepspeed, device)
    return replace(config, notes=(*config.notes, *_slow_precision(config.deepspeed, device)))


def _slow_precision(section: DeepSpeedSection, device: torch.device) -> list[str]:
    """What to do about bf16 on a device that has to emulate it."""
    if not section.bf16.enabled or has_bf16_units(device):
        return []
    what = "processor" if device.type == "cpu" else "GPU"
    return [f"this {what} computes in bf16 many times slower than in fp32: add --set deepspeed.bf16.enabled=false"]


def check_backend(config: RunConfig, backend: str, world_size: int) -> None:
    """Raise ConfigError for what the backend does not do, in a run of any length."""
    if backend == "fsdp":
        check_fsdp_section(config.deepspeed, config.where, world_size)
        return
    zero, key = config.deepspeed.zero_optimization, "deepspeed.zero_optimization.zero_hpz_partition_size"
    if (together := zero.zero_hpz_partition_size or 1) > 1 and zero.stage < 3:
        raise ConfigError(
            f"{key}: {together} has no effect at stage {zero.stage} on DeepSpeed: use stage 3, or --backend fsdp"
        )


def _with_schedule(config: RunConfig, total_steps: int) -> RunConfig:
    section = config.deepspeed
    if section.scheduler is None:
        return config
    schedule = decided(section.scheduler, total_steps, section.optimizer.params["lr"])
    check_length(schedule, total_steps)
    was_auto = {
        f"deepspeed.scheduler.params.{key}" for key, value in section.scheduler.params.items() if value == "auto"
    }
    return replace(
        config,
        deepspeed=section.model_copy(update={"scheduler": schedule}),
        origins=config.origins | dict.fromkeys(was_auto, "auto"),
    )
