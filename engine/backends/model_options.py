"""What the engine does to any model before it is sharded: activation checkpointing and torch.compile."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from trunkline.engine.config.run_config import Training
from trunkline.engine.errors import ConfigError


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks that the model names in `_no_split_modules`: what is recomputed, compiled and sharded."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def apply_options(model: nn.Module, settings: Training) -> nn.Module:
    """The model with the options of the "training" section applied, in place. Raises ConfigError."""
    if settings.activation_checkpointing:
        if not (found := blocks(model)):
            raise ConfigError("training.activation_checkpointing: this model names no blocks; set it to false")
        for block in found:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if settings.compile:
        model.compile(backend=settings.compile if isinstance(settings.compile, str) else "inductor")
    return model
