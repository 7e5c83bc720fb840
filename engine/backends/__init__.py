"""Backends: the only place that knows which engine shards the model."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trunkline.engine.config.deepspeed_section import BatchSizes
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.errors import ConfigError
from trunkline.engine.machine.log import LOG
from trunkline.engine.optim.optimizers import tell_fragments
from trunkline.engine.ranks.distributed import Ranks
from trunkline.engine.state.sharded_state import Fragment


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
    """The bare model inside, for reading its structure."""
    notes: list[str]
    """What whoever starts the run should know of how this model is held."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer inside, whose state is keyed by the owners of `fragments`."""

    def backward(self, loss: Tensor, is_last: bool = True) -> None:
        """Add the gradient of `loss` to that of the step, whose last micro-batch it may be. Summed over the ranks and
        micro-batches of the step, these gradients are the step's: the backend neither averages nor divides."""

    def clip_at(self, max_norm: float) -> None:
        """From now on `step` clips the gradient to this global norm, instead of the configured one; 0 for none."""

    def step(self) -> Stepped:
        """Clip, update the parameters, advance the schedule, clear the gradients."""

    def learning_rate(self) -> float:
        """The rate that the next step will use."""

    def loss_scale(self) -> float:
        """The factor of fp16 loss scaling in force; 1 without it."""

    def gathered(self) -> AbstractContextManager[nn.Module]:
        """The bare model, for gradients that the engine must not see. Entered and used on all ranks alike."""

    def whole(self) -> AbstractContextManager[nn.Module]:
        """The bare model with whole parameters on this rank's device, for forwards without gradients. Entered on all
        ranks; within, no forward of it or of a part of it takes a collective, so that ranks may go different ways."""

    def prefetch(self) -> None:
        """Begin to gather what the next forward needs and what stays gathered until then, if that is anything."""

    def fragments(self) -> list[Fragment]:
        """What this rank holds of each parameter, trainable or not, in an order that is the same on all ranks.

        Over all ranks they cover every element. `engine/state/sharded_state.py` saves and loads a run through them.
        """

    def loss_scaler(self) -> dict[str, float]:
        """The state of dynamic loss scaling: "scale", "iteration", "last_overflow", "hysteresis"; empty without it."""

    def refresh(self) -> None:
        """Bring what is derived from the fragments, such as half-precision copies, up to date with them. Called on all
        ranks, after the fragments have been overwritten."""

    def restore_derived(self, applied_steps: int, loss_scaler: dict[str, float]) -> None:
        """Continue from a loaded state. Called on all ranks, before the first step.

        The fragments and the optimizer's state have been overwritten: bring what is derived from them up to date (such
        as half-precision copies), the schedule to where it is after `applied_steps`, and the loss scaler to its state.
        """

    def close(self) -> None:
        """Let go of the model: once nothing else refers to this backend, its memory is free. After an interrupted step
        too; nothing else may be called then."""

    def full_state(self) -> Iterator[tuple[str, Tensor]]:
        """Names and whole tensors, parameters in master precision, then buffers; one at a time, on the CPU. Called
        and consumed on all ranks."""


def choose_backend(name: str) -> str:
    """What `--backend` names; "auto" is DeepSpeed where it can be imported, else FSDP. Raises ConfigError."""
    if name not in ("auto", "deepspeed", "fsdp"):
        raise ConfigError(f"--backend {name}: unknown backend; use deepspeed, fsdp or auto")
    if name == "fsdp":
        return name
    try:
        import_deepspeed()
    except ImportError as error:
        if name == "deepspeed":
            raise ConfigError(
                f"--backend {name}: deepspeed cannot be imported ({error}); pip install deepspeed, or use fsdp"
            ) from error
        if os.environ.get("RANK", "0") == "0":
            LOG.info(f"--backend auto: training with fsdp, because deepspeed cannot be imported ({error})")
        return "fsdp"
    return "deepspeed"


def import_deepspeed() -> None:
    """DeepSpeed without MLflow, which takes two seconds and which only its autotuner needs. Raises ImportError.

    Without a GPU it is told so, or it would warn that it found none.
    """
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # to Python, a module that there is not
    told = "DS_ACCELERATOR" not in os.environ and not torch.cuda.is_available()
    if told:
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed

        deepspeed.accelerator.get_accelerator()
    finally:
        if hidden:
            del sys.modules["mlflow"]
        if told:
            del os.environ["DS_ACCELERATOR"]


def prepare_backend(
    name: str, model: nn.Module, config: RunConfig, sizes: BatchSizes, ranks: Ranks, total_steps: int,
    kept: Mapping[str, Any] | None = None,
) -> Backend:  # fmt: skip
    """The model under the named engine, ready for its first step, or to load the checkpoint that `kept` is of."""
    backend: Backend
    if name == "fsdp":
        from trunkline.engine.backends.fsdp import FSDPBackend

        backend = FSDPBackend(model, config, sizes, ranks, total_steps, kept)
    else:
        assert name == "deepspeed"
        import_deepspeed()
        from trunkline.engine.backends.deepspeed import DeepSpeedBackend

        backend = DeepSpeedBackend(model, config, sizes, ranks, total_steps, kept)
    tell_fragments(backend.optimizer, backend.fragments(), ranks)
    return backend
