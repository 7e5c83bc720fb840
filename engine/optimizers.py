"""Optimizers by name: DeepSpeed's names, any class of torch.optim, and NVIDIA apex's where that is truly installed.

"Adam" and "AdamW" follow DeepSpeed's meaning ("Adam" decouples the weight decay unless `adam_w_mode` is false) but are
built from torch.optim, whose fused implementation needs no compilation at a user's first step. Names that only
DeepSpeed has are left for it to build.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from engine.deepspeed_section import Optimizer
from engine.errors import ConfigError
from engine.strict import nearest

DEEPSPEED_ONLY = ("Lamb", "Lion", "Muon", "MuAdam", "MuAdamW", "MuSGD")
_APEX = ("FusedAdam", "FusedAdagrad", "FusedLAMB", "FusedNovoGrad", "FusedSGD")


def is_deepspeed_only(section: Optimizer) -> bool:
    """True for the names that no other library builds."""
    return section.type.lower() in [name.lower() for name in DEEPSPEED_ONLY]


def same_name(name: str) -> str:
    """One name for all spellings of an optimizer, and for "Adam" and "AdamW", whose states are the same."""
    names = {known.lower(): known for known in DEEPSPEED_ONLY} | {"adam": "AdamW", "adamw": "AdamW"}
    return names.get(name.lower(), name)


def build_optimizer(parameters: Iterable[nn.Parameter], section: Optimizer) -> torch.optim.Optimizer:
    """The optimizer of a run over these parameters. Raises ConfigError for a name or a parameter that is unknown."""
    cls, params = _resolve(section)
    known = list(inspect.signature(cls.__init__).parameters)[2:]
    for key in params:
        if key not in known:
            raise ConfigError(f"deepspeed.optimizer.params.{key}: unknown to {section.type}{nearest(key, known)}")
    if "betas" in params:
        params["betas"] = tuple(params["betas"])
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    if "fused" in known and "foreach" not in params and all(p.device.type == "cuda" for p in trainable):
        params.setdefault("fused", True)
    try:
        return cls(trainable, **params)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"deepspeed.optimizer.params: {section.type} does not accept {params}: {error}") from error


def _resolve(section: Optimizer) -> tuple[Any, dict[str, Any]]:
    params = dict(section.params)
    if section.type.lower() in ("adam", "adamw"):
        decoupled = params.pop("adam_w_mode", True) or section.type.lower() == "adamw"
        params.pop("torch_adam", None)
        if params.pop("bias_correction", True) is not True:
            raise ConfigError("deepspeed.optimizer.params.bias_correction: false is not supported; remove the key")
        return (torch.optim.AdamW if decoupled else torch.optim.Adam), params
    if section.type.startswith("apex."):
        return _apex_class(section.type.removeprefix("apex.")), params
    names = [key for key, value in vars(torch.optim).items() if inspect.isclass(value) and key != "Optimizer"]
    if section.type not in names:
        known = [*names, *DEEPSPEED_ONLY, *(f"apex.{name}" for name in _APEX)]
        raise ConfigError(f"deepspeed.optimizer.type: unknown optimizer '{section.type}'{nearest(section.type, known)}")
    return getattr(torch.optim, section.type), params


def _apex_class(name: str) -> Any:
    if name not in _APEX:
        raise ConfigError(f"deepspeed.optimizer.type: apex has no '{name}'{nearest(name, _APEX)}")
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
