"""The parameters of optimizers and schedules: names, types and ranges.

    typed(optimizer_params("AdamW"), {"lr": 1e-3}, "AdamW")  engine/config/strict.py::typed raises for a misfit

Names come from the signature of the class, or from a table for classes that are not here to be asked. What a value may
be goes by the parameter's name, else by the type of its default. Nothing is converted: 1 is not true, "0.9" no number.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model
from torch.optim import lr_scheduler

from trunkline.engine.config.deepspeed_parts import Part
from trunkline.engine.config.deepspeed_schedules import DEEPSPEED_SCHEDULES
from trunkline.engine.config.epochs import Steps, or_epochs
from trunkline.engine.config.own_class import is_own, own_class
from trunkline.engine.config.strict import nearest

_Positive = Annotated[float, Field(gt=0)]
_NotNegative = Annotated[float, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]
_PartShare = Annotated[float, Field(gt=0, le=1)]
_Decay = Annotated[float, Field(ge=0, lt=1)]
_Count = Annotated[int, Field(ge=0)]
_Steps = Annotated[int, Field(gt=0)]
_LIST = Field(strict=False)  # JSON has no tuples


def _rate(value: Any) -> Any:
    (rate,) = value if isinstance(value, list) and len(value) == 1 else (value,)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < float("inf"):
        raise ValueError("expected a number from 0 on")
    return value


def _steps_or_auto(value: Any) -> Any:
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError('must be a positive integer, or "auto"')
    return value


def _warmup(value: Any) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value < float("inf") or (value >= 1 and value != int(value)):
        raise ValueError("expected a number from 0 on: below 1 a share of the run, from 1 on a number of steps")
    return value


def _only_true(why: str) -> Any:
    def check(value: bool) -> bool:
        if not value:
            raise ValueError(why)
        return value

    return Annotated[bool, AfterValidator(check)]


_Rate = Annotated[Any, AfterValidator(_rate)]
_RateOrAuto = Annotated[Any, AfterValidator(lambda value: value if value == "auto" else _rate(value))]
_StepsOrAuto = or_epochs(Annotated[Any, AfterValidator(_steps_or_auto)])

_OPTIMIZER: dict[str, Any] = {
    "lr": _NotNegative,
    "muon_lr": _NotNegative,
    "adam_lr": _NotNegative,
    "weight_decay": _NotNegative,
    "betas": Annotated[tuple[_Decay, _Decay], _LIST],
    "eps": _Positive,
    "momentum": _Decay,
    "dampening": _Share,
    "alpha": _Share,
    "rho": _Share,
    "lr_decay": _NotNegative,
    "initial_accumulator_value": _NotNegative,
    "lambd": _NotNegative,
    "t0": _NotNegative,
    "momentum_decay": _NotNegative,
    "etas": Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], Annotated[float, Field(gt=1)]], _LIST],
    "step_sizes": Annotated[tuple[_Positive, _Positive], _LIST],
    "beta2_decay": Annotated[float, Field(le=0)],
    "d": Annotated[float, Field(ge=1)],
    "Adafactor.eps": Annotated[tuple[_NotNegative | None, _NotNegative], _LIST],
    "foreach": bool | None,
    "fused": bool | None,
    "min_rms": _Positive,
    "max_coeff": _Positive,
    "min_coeff": _Positive,
    "max_grad_norm": _NotNegative,
    "norm_type": _Count,
    "ns_method": Literal["gram", "standard"],
}

_SCHEDULE: dict[str, Any] = {
    "warmup": or_epochs(Annotated[Any, AfterValidator(_warmup)]),
    "min_ratio": _Share,
    "shape": Literal["cosine", "cosine_restarts", "linear", "constant", "polynomial", "step"],
    "start_ratio": _Share,
    "min_lr": _NotNegative,
    "start_momentum": _Decay | None,
    "every": Steps,
    "step_size": Steps,
    "milestones": Annotated[list[Steps], Field(min_length=1)],
    "T_max": _StepsOrAuto,
    "T_0": Steps,
    "T_mult": _Steps,
    "total_iters": _StepsOrAuto,
    "total_steps": _StepsOrAuto,
    "epochs": _Steps,
    "steps_per_epoch": _Steps,
    "gamma": _Positive,
    "factor": _PartShare,
    "start_factor": _PartShare,
    "end_factor": _Share,
    "power": _Positive,
    "eta_min": _NotNegative,
    "pct_start": _Share,
    "anneal_strategy": Literal["cos", "linear"],
    "div_factor": _Positive,
    "final_div_factor": _Positive,
    "base_lr": _Rate,
    "max_lr": _Rate,
    "base_momentum": _Decay,
    "max_momentum": _Decay,
    "step_size_up": Steps,
    "step_size_down": Steps | None,
    "mode": Literal["triangular", "triangular2", "exp_range"],
    "scale_fn": None,
    "scale_mode": Literal["cycle", "iterations"],
    "cycle_momentum": bool,
    "total_num_steps": _StepsOrAuto,
    "warmup_num_steps": _StepsOrAuto,
    "warmup_min_lr": _Rate,
    "warmup_max_lr": _RateOrAuto,
    "warmup_type": Literal["log", "linear"],
    "warmup_min_ratio": _Share,
    "cos_min_ratio": _Share,
    "cycle_min_lr": _Rate,
    "cycle_max_lr": _Rate,
    "decay_lr_rate": _NotNegative,
    "cycle_first_step_size": or_epochs(_Positive),
    "cycle_second_step_size": or_epochs(_NotNegative | None),
    "cycle_first_stair_count": _Count,
    "cycle_second_stair_count": _Count | None,
    "decay_step_size": or_epochs(_NotNegative),
    "cycle_min_mom": _Decay,
    "cycle_max_mom": _Decay,
    "decay_mom_rate": _NotNegative,
    "lr_range_test_min_lr": _Rate,
    "lr_range_test_step_size": Steps,
    "lr_range_test_step_rate": _NotNegative,
}

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
    if kind.lower() in _ELSEWHERE or kind in _ELSEWHERE:
        names = _ELSEWHERE.get(kind) or _ELSEWHERE[kind.lower()]
        fields: dict[str, Any] = {name: (_OPTIMIZER.get(name, bool), Field(None)) for name in names.split()}
    elif kind.lower() in ("adam", "adamw"):
        decoupled = _only_true("AdamW always decouples the weight decay: remove the key, or use Adam")
        corrected = _only_true("false is not supported: remove the key")
        fields = _fields(torch.optim.AdamW, _OPTIMIZER) | {
            "adam_w_mode": (decoupled if kind.lower() == "adamw" else bool, True),
            "torch_adam": (bool, True),
            "bias_correction": (corrected, True),
        }
    else:
        fields = _fields(optimizer_class(kind), _OPTIMIZER)
    return create_model(kind, __base__=_Params, **fields | {"lr": (_OPTIMIZER["lr"], ...)})


@cache
def scheduler_params(kind: str) -> type[BaseModel]:
    """The section scheduler.params of a known schedule. "auto" is left in place of what depends on the run."""
    if kind in OWN_SCHEDULES:
        fields: dict[str, Any] = {name: (_SCHEDULE[name], default) for name, default in OWN_SCHEDULES[kind].items()}
    else:
        fields = _fields(DEEPSPEED_SCHEDULES.get(kind) or scheduler_class(kind), _SCHEDULE)
    return create_model(kind, __base__=_Params, **fields)


class _Params(Part):
    """Defaults are those of the class, which are not checked."""

    model_config = ConfigDict(validate_default=False)
    left_out: ClassVar[dict[str, Any]] = dict.fromkeys(DECIDED_BY_THE_RUN, "auto")


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
        return Annotated[tuple[bool | int | float | str, ...], _LIST]
    return str if isinstance(default, str) else bool | int | float | str | None
