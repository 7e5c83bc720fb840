"""What the engine does to any model before it is sharded: activation checkpointing and torch.compile."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trunkline.engine.config.run_config import Training
from trunkline.engine.errors import ConfigError


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks that the model names in `_no_split_modules`: what is recomputed, compiled and sharded."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


_GRAPHS = 64
"""At most, of a block: by shapes, and for training, evaluation and the probe sample; torch's 8 may be too few."""


def apply_options(model: nn.Module, settings: Training) -> nn.Module:
    """The model with the options of the "training" section applied, in place. Raises ConfigError.

    Blocks are compiled one by one, each as one graph: they share the graph, whatever shards them acts around it, and
    compiling takes no longer for a deeper model.
    """
    found = blocks(model)
    if settings.activation_checkpointing and not found:
        raise ConfigError("training.activation_checkpointing: this model names no blocks; set it to false")
    backend = settings.compile if isinstance(settings.compile, str) else "inductor"
    if settings.compile:
        torch.compiler.reset()  # the graphs of a model before this one
    for block in found:
        if settings.compile:
            block.forward = torch.compile(  # type: ignore[call-overload]  # its overloads lack recompile_limit
                block.forward, backend=backend, fullgraph=True, recompile_limit=_GRAPHS
            )
        if settings.activation_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if settings.compile and not found:
        model.compile(backend=backend)
    return model
