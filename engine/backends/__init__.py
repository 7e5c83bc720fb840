"""Backends: the only place that knows which engine shards the model, and everything in which those engines differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from engine.config import RunConfig
from engine.deepspeed_section import BatchSizes
from engine.distributed import Ranks
from engine.errors import ConfigError


@dataclass(frozen=True)
class Stepped:
    """What an optimizer step did.

    `grad_norm` is the global norm before clipping, a scalar on the device or a float. A `skipped` step left the model
    and the schedule as they were, because a gradient was not finite.
    """

    grad_norm: Tensor | float
    skipped: bool


class Backend(Protocol):
    """A model under training on all ranks."""

    name: str
    model: nn.Module
    """What a task calls. Its parameters may be sharded."""
    module: nn.Module
    """The bare model inside: for reading its structure, and for gradients that the engine must not see."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to that of the step. Summed over the ranks and micro-batches of the step, these
        gradients are the step's: the backend neither averages nor divides."""

    def step(self) -> Stepped:
        """Clip, update the parameters, advance the schedule, clear the gradients."""

    def learning_rate(self) -> float:
        """The rate that the next step will use."""

    def loss_scale(self) -> float:
        """The factor of fp16 loss scaling in force; 1 without it."""

    def save(self, folder: Path) -> None:
        """Write model, optimizer, schedule and loss scale into `folder`. Called on all ranks."""

    def load(self, folder: Path) -> None:
        """Take up what `save` wrote. Called on all ranks, before the first step."""

    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        """Names and whole tensors, parameters in master precision, then buffers; one at a time, on the CPU. Called
        and consumed on all ranks."""


def choose_backend(name: str) -> str:
    """The backend that `--backend` names: "deepspeed", or "auto" for what is installed. Raises ConfigError."""
    if name not in ("auto", "deepspeed"):
        raise ConfigError(f"--backend {name}: unknown backend; use deepspeed or auto")
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--backend {name}: deepspeed cannot be imported ({error}); pip install deepspeed") from error
    return "deepspeed"


def prepare_backend(
    name: str, model: nn.Module, config: RunConfig, sizes: BatchSizes, ranks: Ranks, total_steps: int
) -> Backend:
    """The model under the named engine, ready for its first step."""
    assert name == "deepspeed"
    from engine.backends.deepspeed import DeepSpeedBackend

    return DeepSpeedBackend(model, config, sizes, ranks, total_steps)
