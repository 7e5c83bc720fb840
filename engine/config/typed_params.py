"""The parameters of optimizers and schedules: names, types and ranges.

    typed(optimizer_params("AdamW"), {"lr": 1e-3}, "AdamW")  engine/config/strict.py::typed raises for a misfit

Names come from the signature of the class, or from a table for classes that are not here to be asked. What a value may
be goes by the parameter's name (param_kinds.py), else by the type of its default. param_meanings.py says what it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, ClassVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model
from torch.optim import lr_scheduler

from trunkline.engine.config.deepspeed_parts import Part
from trunkline.engine.config.deepspeed_schedules import DEEPSPEED_SCHEDULES
from trunkline.engine.config.own_class import is_own, own_class
from trunkline.engine.config.param_kinds import LIST, OPTIMIZER_KINDS, SCHEDULE_KINDS
from trunkline.engine.config.param_meanings import OPTIMIZER, SCHEDULE, meaning
from trunkline.engine.config.strict import nearest


def _only_true(why: str) -> Any:
    def check(value: bool) -> bool:
        if not value:
            raise ValueError(why)
        return value

    return Annotated[bool, AfterValidator(check)]


_ADAM = "lr betas eps weight_decay amsgrad"
_SGD = "lr momentum dampening weight_decay nesterov"
_ELSEWHERE = {
    "adamwscale": "lr betas eps weight_decay min_rms",
    "lamb": "lr bias_correction betas eps eps_inside_sqrt weight_decay max_coeff min_coeff",
    "lion": "lr betas weight_decay",
    "muon": "lr muon_lr adam_lr momentum weight_decay ns_method betas eps adam_w_mode torch_adam",
    "muadam": _ADAM,
    "muadamw": _ADAM,
    "musgd": _SGD,
    "apex.FusedAdam": f"{_ADAM} bias_correction adam_w_mode set_grad_none capturable master_weights",
    "apex.FusedAdagrad": "lr eps weight_decay set_grad_none adagrad_w_mode",
    "apex.FusedLAMB": f"{_ADAM} bias_correction adam_w_mode grad_averaging set_grad_none max_grad_norm use_nvlamb",
    "apex.FusedNovoGrad": f"{_ADAM} bias_correction reg_inside_moment grad_averaging norm_type init_zero set_grad_none",
    "apex.FusedSGD": f"{_SGD} wd_after_momentum materialize_master_grads set_grad_none",
}
"""Parameters of optimizers that DeepSpeed, apex or the engine build. Those that no table of types names are
switches."""

ADAMW_SCALE = "AdamWScale"
DEEPSPEED_ONLY = ("Lamb", "Lion", "Muon", "MuAdam", "MuAdamW", "MuSGD")
APEX = tuple(name.removeprefix("apex.") for name in _ELSEWHERE if name.startswith("apex."))

DECIDED_BY_THE_RUN = ("total_num_steps", "T_max", "total_steps", "total_iters", "warmup_num_steps", "warmup_max_lr")
"""Parameters of schedules that may be "auto" until the number of steps is known."""

OWN_SCHEDULES: dict[str, dict[str, Any]] = {
    "WarmupCosine": {"warmup": 0.1, "min_ratio": 0.0},
    "WarmupLinear": {"warmup": 0.1, "min_ratio": 0.0},
    "Constant": {"warmup": 0.0},
    "InverseSqrt": {"warmup": 10_000},
    "WarmupShape": {
        "shape": "cosine", "warmup": 0.1, "start_ratio": 0.1, "min_ratio": 0.0, "min_lr": 0.0, "every": 1,
        "start_momentum": None,
    },
}  # fmt: skip
_UNWRITABLE = {
    "LambdaLR": "takes a function, which JSON cannot hold",
    "MultiplicativeLR": "takes a function, which JSON cannot hold",
    "SequentialLR": "takes other schedules, which JSON cannot hold",
    "ChainedScheduler": "takes other schedules, which JSON cannot hold",
    "ReduceLROnPlateau": "follows a metric, not the step",
    "LRScheduler": "is what the others are made from",
}


def known_optimizer(kind: str) -> str:
    """The name of an optimizer that can be built somewhere. Raises ValueError for any other."""
    names = writable_optimizers()
    if is_own(kind):
        own_class(kind, torch.optim.Optimizer)
    elif kind not in names and kind.lower() not in _ELSEWHERE and kind.lower() not in ("adam", "adamw"):
        raise ValueError(f"unknown optimizer '{kind}'{nearest(kind, names)}")
    return kind


def writable_optimizers() -> list[str]:
    """The names that a file can hold, each once. Those that DeepSpeed builds are known in any case."""
    names = [key for key, value in vars(torch.optim).items() if inspect.isclass(value) and key != "Optimizer"]
    return list(dict.fromkeys([*names, ADAMW_SCALE, *DEEPSPEED_ONLY, *(f"apex.{name}" for name in APEX)]))


def known_scheduler(kind: str) -> str:
    """The name of a schedule that a file can describe. Raises ValueError for any other."""
    if is_own(kind):
        own_class(kind, lr_scheduler.LRScheduler)
        return kind
    if kind in _UNWRITABLE:
        raise ValueError(f"{kind} {_UNWRITABLE[kind]}; use WarmupCosine")
    if kind not in (known := writable_schedulers()):
        raise ValueError(f"unknown schedule '{kind}'{nearest(kind, known)}")
    return kind


def writable_schedulers() -> list[str]:
    """The names that a file can hold, each once."""
    names = [
        key
        for key, value in vars(lr_scheduler).items()
        if inspect.isclass(value) and issubclass(value, lr_scheduler.LRScheduler) and key[0] != "_"
    ]
    names = [*OWN_SCHEDULES, *DEEPSPEED_SCHEDULES, *(name for name in names if name not in _UNWRITABLE)]
    return list(dict.fromkeys(names))


def optimizer_class(kind: str) -> Any:
    """The class of torch.optim, or of a user's own, that a known name stands for."""
    return own_class(kind, torch.optim.Optimizer) if is_own(kind) else getattr(torch.optim, kind)


def scheduler_class(kind: str) -> Any:
    """The class of torch.optim.lr_scheduler, or of a user's own, that a known name stands for."""
    return own_class(kind, lr_scheduler.LRScheduler) if is_own(kind) else getattr(lr_scheduler, kind)


@cache
def optimizer_params(kind: str) -> type[BaseModel]:
    """The section optimizer.params of a known optimizer. The learning rate is required: nothing else chooses it."""
    fields: dict[str, Any]
    if kind.lower() in _ELSEWHERE or kind in _ELSEWHERE:
        names = _ELSEWHERE.get(kind) or _ELSEWHERE[kind.lower()]
        fields = {name: (OPTIMIZER_KINDS.get(name, bool), None) for name in names.split()}
    elif kind.lower() in ("adam", "adamw"):
        decoupled = _only_true("AdamW always decouples the weight decay: remove the key, or use Adam")
        corrected = _only_true("false is not supported: remove the key")
        fields = _fields(torch.optim.AdamW, OPTIMIZER_KINDS) | {
            "adam_w_mode": (decoupled if kind.lower() == "adamw" else bool, True),
            "torch_adam": (bool, True),
            "bias_correction": (corrected, True),
        }
    else:
        fields = _fields(optimizer_class(kind), OPTIMIZER_KINDS)
    return _model(kind, fields | {"lr": (OPTIMIZER_KINDS["lr"], ...)}, OPTIMIZER)


@cache
def scheduler_params(kind: str) -> type[BaseModel]:
    """The section scheduler.params of a known schedule. "auto" is left in place of what depends on the run."""
    if kind in OWN_SCHEDULES:
        fields: dict[str, Any] = {
            name: (SCHEDULE_KINDS[name], default) for name, default in OWN_SCHEDULES[kind].items()
        }
    else:
        fields = _fields(DEEPSPEED_SCHEDULES.get(kind) or scheduler_class(kind), SCHEDULE_KINDS)
    return _model(kind, fields, SCHEDULE)


class _Params(Part):
    """Defaults are those of the class, which are not checked."""

    model_config = ConfigDict(validate_default=False)
    left_out: ClassVar[dict[str, Any]] = dict.fromkeys(DECIDED_BY_THE_RUN, "auto")


def _model(kind: str, fields: dict[str, Any], meanings: dict[str, str]) -> type[BaseModel]:
    described: dict[str, Any] = {
        name: (kinds, Field(default, description=meaning(meanings, name, kind)))
        for name, (kinds, default) in fields.items()
    }
    return create_model(kind, __base__=_Params, **described)


def _fields(made_by: Callable[..., Any], kinds: dict[str, Any]) -> dict[str, Any]:
    """Name -> type and default, from the signature of a class or a function; without what the engine hands in."""
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(made_by).parameters.items():
        if name in ("params", "optimizer", "group", "last_epoch") or parameter.kind.name.startswith("VAR_"):
            continue
        required = parameter.default is parameter.empty
        kind = kinds.get(f"{made_by.__name__}.{name}", kinds.get(name, _by_default(parameter.default)))
        fields[name] = (kind, ... if required else parameter.default)
    return fields


def _by_default(default: Any) -> Any:
    if isinstance(default, bool):
        return bool
    if isinstance(default, (int, float)):
        return float if isinstance(default, float) else int | float
    if isinstance(default, (tuple, list)):
        return Annotated[tuple[bool | int | float | str, ...], LIST]
    return str if isinstance(default, str) else bool | int | float | str | None
