"""Optimizers by name: DeepSpeed's, torch.optim's, and NVIDIA apex's where installed.

`trunkline.engine.config.typed_params` says which names and parameters there are; here they become objects.

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

from trunkline.engine.config.deepspeed_section import Optimizer
from trunkline.engine.config.typed_params import DEEPSPEED_ONLY
from trunkline.engine.errors import ConfigError


def same_name(name: str) -> str:
    """One name for all spellings of an optimizer, and for "Adam" and "AdamW", whose states are the same."""
    names = {known.lower(): known for known in DEEPSPEED_ONLY} | {"adam": "AdamW", "adamw": "AdamW"}
    return names.get(name.lower(), name)


def build_optimizer(
    parameters: Iterable[nn.Parameter] | list[dict[str, Any]], section: Optimizer
) -> torch.optim.Optimizer:
    """The optimizer of a run over these parameters, of which those that are frozen are left out, or over these groups.

    Raises ConfigError for values that do not go together.
    """
    cls, params = _resolve(section)
    known = inspect.signature(cls.__init__).parameters
    if "betas" in params:
        params["betas"] = tuple(params["betas"])
    given = [each for each in parameters if isinstance(each, dict) or each.requires_grad]
    trainable = [parameter for each in given for parameter in (each["params"] if isinstance(each, dict) else [each])]
    if "fused" in known and "foreach" not in params and all(p.device.type == "cuda" for p in trainable):
        params.setdefault("fused", True)
    try:
        return cls(given, **params)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"deepspeed.optimizer.params: {section.type} does not accept {params}: {error}") from error


def _resolve(section: Optimizer) -> tuple[Any, dict[str, Any]]:
    params = dict(section.params)
    if section.type.lower() in ("adam", "adamw"):
        decoupled = params.pop("adam_w_mode", True)
        for key in ("torch_adam", "bias_correction"):  # torch's it is, and corrects
            params.pop(key, None)
        return (torch.optim.AdamW if decoupled else torch.optim.Adam), params
    if section.type.startswith("apex."):
        return _apex_class(section.type.removeprefix("apex.")), params
    return getattr(torch.optim, section.type), params


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
