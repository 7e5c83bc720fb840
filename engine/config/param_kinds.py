"""What a parameter of optimizers and schedules may be, by its name.

A name that is another thing to one class stands there with the class: OPTIMIZER_KINDS["Adafactor.eps"]. Nothing is
converted: 1 is not true, "0.9" no number.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from trunkline.engine.config.epochs import Steps, or_epochs

_Positive = Annotated[float, Field(gt=0)]
_NotNegative = Annotated[float, Field(ge=0)]
_Share = Annotated[float, Field(ge=0, le=1)]
_PartShare = Annotated[float, Field(gt=0, le=1)]
_Decay = Annotated[float, Field(ge=0, lt=1)]
_Count = Annotated[int, Field(ge=0)]
_Steps = Annotated[int, Field(gt=0)]
LIST = Field(strict=False)  # JSON has no tuples


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


_Rate = Annotated[Any, AfterValidator(_rate)]
_RateOrAuto = Annotated[Any, AfterValidator(lambda value: value if value == "auto" else _rate(value))]
_StepsOrAuto = or_epochs(Annotated[Any, AfterValidator(_steps_or_auto)])

OPTIMIZER_KINDS: dict[str, Any] = {
    "lr": _NotNegative,
    "muon_lr": _NotNegative,
    "adam_lr": _NotNegative,
    "weight_decay": _NotNegative,
    "betas": Annotated[tuple[_Decay, _Decay], LIST],
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
    "etas": Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], Annotated[float, Field(gt=1)]], LIST],
    "step_sizes": Annotated[tuple[_Positive, _Positive], LIST],
    "beta2_decay": Annotated[float, Field(le=0)],
    "d": Annotated[float, Field(ge=1)],
    "Adafactor.eps": Annotated[tuple[_NotNegative | None, _NotNegative], LIST],
    "foreach": bool | None,
    "fused": bool | None,
    "min_rms": _Positive,
    "max_coeff": _Positive,
    "min_coeff": _Positive,
    "max_grad_norm": _NotNegative,
    "norm_type": _Count,
    "ns_method": Literal["gram", "standard"],
}

SCHEDULE_KINDS: dict[str, Any] = {
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
