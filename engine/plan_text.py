"""The plan of a run (engine/plan.py) for a person to read."""

from __future__ import annotations

from typing import Any

from trunkline.engine.config.typed_params import ADAMW_SCALE
from trunkline.engine.optim.parameter_rules import render_rules


def render_plan(plan: dict[str, Any]) -> str:
    """The plan for a person to read: the summary, then every value of the configuration with its origin."""
    values = dict(_flat(plan["config"]))
    width = max(len(key) for key in values)
    lines = [f"{key:<{width}}  {value!s:<40}  ({plan['origins'].get(key, 'default')})" for key, value in values.items()]
    return "\n".join([render_summary(plan), "", *lines])


def render_summary(plan: dict[str, Any]) -> str:
    """What a run is, in a few lines. Of what is not known it says why."""
    relative = plan["config"]["deepspeed"]["optimizer"]["type"].lower() == ADAMW_SCALE.lower()
    lines = [
        f"{plan['workload']}: {_parameters(plan)}",
        f"batch       {plan['global_batch_size']} = {plan['micro_batch_size']} a micro-batch x {plan['world_size']} "
        f"ranks x {plan['grad_accum_steps']} accumulation steps",
        f"steps       {_steps(plan)}",
        *([f"in steps    {_pairs(plan['in_steps'])}"] if plan["in_steps"] else []),
    ]
    if plan["learning_rate"] is not None:
        rates = _pairs({name: f"{rate:.3g}" for name, rate in plan["learning_rate"].items()})
        lines.append(f"lr          {rates}{relative * ', each times the root mean square of the parameter'}")
    if plan["parameters"] is not None:
        memory = {
            name: "unknown" if size is None else readable_size(size)
            for name, size in plan["memory_bytes"].items()
            if size != 0
        }
        total = sum(size for size in plan["memory_bytes"].values() if size is not None)
        lines += [
            f"memory      {readable_size(total)} a rank: {_pairs(memory)}",
            f"checkpoint  {readable_size(plan['checkpoint_bytes'])} in all",
            *render_rules(plan["parameter_rules"], plan["tied_parameters"]),
        ]
    lines += _unknown(plan)
    return "\n".join([*lines, *(f"note: {line}" for line in plan["notes"])])


def _parameters(plan: dict[str, Any]) -> str:
    if plan["parameters"] is None:
        return "a number of parameters that is unknown"
    frozen = plan["parameters"] - plan["trainable_parameters"]
    said = f"{plan['parameters']:,} parameters, {plan['trainable_parameters']:,} of them trained"
    return said + (f", {frozen:,} frozen" if frozen else "")


def _steps(plan: dict[str, Any]) -> str:
    if plan["train_samples"] is None:
        return f"unknown, {plan['epochs']} epochs" if plan["steps"] is None else f"{plan['steps']:,}"
    return (
        f"{plan['steps']:,} = {plan['epochs']:.4g} epochs of {plan['steps_per_epoch']:,} "
        f"({plan['train_samples']:,} samples)"
    )


def _unknown(plan: dict[str, Any]) -> list[str]:
    figures: dict[str, list[str]] = {}
    for figure, why in plan["unknown"].items():
        figures.setdefault(why, []).append(figure)
    lines = [f"unknown     {'; '.join(names)}: {why}" for why, names in figures.items()]
    return lines + ["            --samples N stands in for the number of training samples"] * (
        plan["train_samples"] is None
    )


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, item in value.items():
        pairs += _flat(item, f"{prefix}{key}.") if isinstance(item, dict) and item else [(f"{prefix}{key}", item)]
    return pairs


def readable_size(count: float) -> str:
    """Bytes for a person to read."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"
