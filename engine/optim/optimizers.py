"""Optimizers by name: DeepSpeed's, torch.optim's, AdamWScale, NVIDIA apex's where installed, and a user's own.

`trunkline.engine.config.typed_params` says which names and parameters there are; here they become objects.

"Adam" and "AdamW" follow DeepSpeed's meaning ("Adam" decouples the weight decay unless `adam_w_mode` is false) but are
built from torch.optim, whose fused implementation needs no compilation at a user's first step. Names that only
DeepSpeed has are left for it to build.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from trunkline.engine.config.deepspeed_section import Optimizer
from trunkline.engine.config.typed_params import ADAMW_SCALE, DEEPSPEED_ONLY, optimizer_class
from trunkline.engine.errors import ConfigError
from trunkline.engine.optim.adamw_scale import AdamWScale
from trunkline.engine.ranks.distributed import Ranks
from trunkline.engine.state.sharded_state import Fragment


def same_name(name: str) -> str:
    """One name for all spellings of an optimizer, and for "Adam" and "AdamW", whose states are the same."""
    names = {known.lower(): known for known in (*DEEPSPEED_ONLY, ADAMW_SCALE)} | {"adam": "AdamW", "adamw": "AdamW"}
    return names.get(name.lower(), name)


def build_optimizer(
    parameters: Iterable[nn.Parameter] | list[dict[str, Any]], section: Optimizer
) -> torch.optim.Optimizer:
    """The optimizer of a run over these parameters, of which those that are frozen are left out, or over these groups.

    Raises ConfigError for values that do not go together.
    """
    cls, params = _resolve(section)
    known = inspect.signature(cls.__init__).parameters
    params = {key: tuple(value) if isinstance(value, list) else value for key, value in params.items()}
    given = [each for each in parameters if isinstance(each, dict) or each.requires_grad]
    trainable = [parameter for each in given for parameter in (each["params"] if isinstance(each, dict) else [each])]
    otherwise = {"foreach", "differentiable", "capturable"} & params.keys()
    if "fused" in known and not otherwise and all(p.device.type in ("cpu", "cuda") for p in trainable):
        params.setdefault("fused", True)
    try:
        return cls(given, **params)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"deepspeed.optimizer.params: {section.type} does not accept {params}: {error}") from error


@runtime_checkable
class OverWholeParameters(Protocol):
    """An optimizer that changes an element by what others of its parameter are, and can do so when they are split."""

    def split(self, fragments: Sequence[Fragment], ranks: Ranks) -> None:
        """Learn which parts of which parameters the tensors hold that `step` changes. Called on all ranks, which from
        then on call `step` equally often. What is kept for a tensor must still have a value for each element."""


def tell_fragments(optimizer: torch.optim.Optimizer, fragments: Sequence[Fragment], ranks: Ranks) -> None:
    """Let an optimizer that asks for it know how parameters are split. Called on all ranks."""
    if isinstance(optimizer, OverWholeParameters):
        optimizer.split(fragments, ranks)


def _resolve(section: Optimizer) -> tuple[Any, dict[str, Any]]:
    params = dict(section.params)
    if section.type.lower() in ("adam", "adamw"):
        decoupled = params.pop("adam_w_mode", True)
        for key in ("torch_adam", "bias_correction"):  # torch's it is, and corrects
            params.pop(key, None)
        return (torch.optim.AdamW if decoupled else torch.optim.Adam), params
    if section.type.startswith("apex."):
        return _apex_class(section.type.removeprefix("apex.")), params
    if section.type.lower() == ADAMW_SCALE.lower():
        return AdamWScale, params
    return optimizer_class(section.type), params


def _apex_class(name: str) -> Any:
    try:
        from apex import optimizers
    except ImportError as error:
        try:
            found = f"apex {importlib.metadata.version('apex')} is installed, but it is the unrelated web toolkit"
        except importlib.metadata.PackageNotFoundError:
            found = "apex is not installed"
        raise ConfigError(
            f"deepspeed.optimizer.type: apex.{name} needs NVIDIA's apex, built from its source; {found}. Use AdamW"
        ) from error
    return getattr(optimizers, name)
