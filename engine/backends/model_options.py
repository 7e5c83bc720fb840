"""What the engine does to any model before it is sharded: activation checkpointing and torch.compile."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

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
    compiling takes no longer for a deeper model. A block that is not one graph raises ConfigError when it is called. A
    model that knows that its blocks are none says so, and what to do, in an attribute `no_graph`.
    """
    found = blocks(model)
    if settings.activation_checkpointing and not found:
        raise ConfigError("training.activation_checkpointing: this model names no blocks; set it to false")
    backend = settings.compile if isinstance(settings.compile, str) else "inductor"
    if settings.compile:
        if why := getattr(model, "no_graph", ""):
            raise ConfigError(f"training.compile: {why}")
        torch.compiler.reset()  # the graphs of a model before this one
    for block in found:
        if settings.compile:
            block.forward = _as_one_graph(block, backend)
        if settings.activation_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if settings.compile and not found:
        model.compile(backend=backend)
    return model


def _as_one_graph(block: nn.Module, backend: str) -> Callable[..., Any]:
    """The block's forward, compiled."""
    compiled = torch.compile(  # type: ignore[call-overload]  # its overloads lack recompile_limit
        block.forward, backend=backend, fullgraph=True, recompile_limit=_GRAPHS
    )

    @wraps(block.forward)
    def forward(*arguments: Any, **named: Any) -> Any:
        try:
            return compiled(*arguments, **named)
        except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            what, places = str(error).splitlines()[0], re.findall(r'File (".*", line \d+)', str(error))
            raise ConfigError(
                f"training.compile: {type(block).__name__}: cannot be compiled as one graph: "
                f"{', '.join([what, *places[-1:]])}: set training.compile=false, or mend the block"
            ) from error

    return forward
