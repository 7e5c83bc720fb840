"""What flags of several workloads mean: functions for trunkline.engine.config.flags.Flag.

    Flag("amp", "mixed precision", bool, mixed_precision, default=BY_DEVICE, check=note_of_precision)
    Flag("weight_decay", "of norms and biases too", float, decay_of_all)

This module imports nothing that takes long.
"""

from __future__ import annotations

from typing import Any

from trunkline.engine.config.draft import value_at

BY_DEVICE = "by device"
"""A default that a user cannot type. --plan shows what it comes to."""
_DECAY, _RULES = "deepspeed.optimizer.params.weight_decay", "training.parameters"

Config = dict[str, Any]


def mixed_precision(config: Config, value: bool | str, world_size: int) -> Config:
    """bf16, or fp16 on a GPU that is too old for it; on a CPU by default none."""
    kind = "bf16" if value else ""
    if value == BY_DEVICE or value:
        import torch  # which is there by now

        if torch.cuda.is_available():
            kind = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        elif value == BY_DEVICE:
            kind = ""
    return {f"deepspeed.{name}.enabled": name == kind for name in ("bf16", "fp16")}


def note_of_precision(config: Config, value: bool) -> list[str]:
    """What to say where mixed precision is asked for without a GPU."""
    import torch  # which is there by now

    if not value or torch.cuda.is_available():
        return []
    return ["mixed precision is asked for, and there is no GPU: bf16 on the CPU, which is slow on most"]


def decay_of_all(config: Config, value: float, world_size: int) -> Config:
    """The weight decay of all parameters, as torch's optimizers have it, unless the file has rules of its own."""
    rules = value_at(config, _RULES) or [{"names": ["*"]}]
    every = len(rules) == 1 and rules[0].get("names") == ["*"]
    return {_DECAY: value, **({_RULES: [{**rules[0], "weight_decay": value}]} if every else {})}
