"""Checks of a configuration that need the run's length, ranks and backend.

They come before anything is built.

config = ready(config, "deepspeed", total_steps, world_size, device)     "auto" decided, faults named
"""

from __future__ import annotations

from dataclasses import replace

import torch

from trunkline.engine.config.deepspeed_section import DeepSpeedSection
from trunkline.engine.config.fsdp_section import check_fsdp_section
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.errors import ConfigError
from trunkline.engine.optim.extensions import check_compiler
from trunkline.engine.optim.optimizer_probe import check_optimizer
from trunkline.engine.optim.schedules import check_length, decided


def ready(config: RunConfig, backend: str, total_steps: int, world_size: int, device: torch.device) -> RunConfig:
    """The configuration with a value for each "auto" that the number of steps decides.

    Raises ConfigError for a schedule that does not fit the run, an optimizer that could not be saved, split or resumed,
    or built, and for what the backend does not do.
    """
    if backend == "fsdp":
        check_fsdp_section(config.deepspeed, config.where, world_size)
    if backend == "deepspeed":
        _check_deepspeed(config.deepspeed)
    config = _with_schedule(config, total_steps)
    check_optimizer(config.deepspeed, backend, total_steps, device)
    check_compiler(config.deepspeed, device)
    return replace(config, notes=(*config.notes, *_slow_on_a_cpu(config.deepspeed, device)))


def _slow_on_a_cpu(section: DeepSpeedSection, device: torch.device) -> list[str]:
    """What to do about bf16 on a processor that has to emulate it."""
    able = torch.cpu.get_capabilities()
    if device.type != "cpu" or not section.bf16.enabled or any(able.get(name) for name in _BF16_UNITS):
        return []
    return [
        "note: this processor computes in bf16 many times slower than in fp32: add --set deepspeed.bf16.enabled=false"
    ]


_BF16_UNITS = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16")
"""Any of them, as torch.cpu.get_capabilities names them on x86-64 and on Arm."""


def _check_deepspeed(section: DeepSpeedSection) -> None:
    stage, together = section.zero_optimization.stage, section.zero_optimization.zero_hpz_partition_size or 1
    if together > 1 and stage < 3:
        raise ConfigError(
            f"deepspeed.zero_optimization.zero_hpz_partition_size: {together} has no effect at stage {stage} on "
            "DeepSpeed: use stage 3, or --backend fsdp"
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
