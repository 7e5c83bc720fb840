"""How each parameter of a model is trained: the rules of `training.parameters`, and what holds without one.

    freeze(model, config)                  requires_grad off where a rule says "frozen"
    parameter_groups(model, config, kept)  groups of the optimizer, for torch and for DeepSpeed
    treatments(model, config)              each parameter with its rule, weight decay and rate

Where no rule gives a weight decay it is the optimizer's, and 0 on norms and biases, which transformers' Trainer leaves
out by the same names (`Trainer.get_decay_parameter_names`). Norms are also known by their class: LayerNorm, RMSNorm,
BatchNorm, GroupNorm, InstanceNorm and whatever else has a class whose name ends in "Norm".
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from trunkline.engine.config.deepspeed_section import Optimizer
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.config.typed_params import optimizer_params
from trunkline.engine.errors import ConfigError

LR_SCALE = "lr_scale"
"""The key of an optimizer's group by which its rate differs from the schedule's (engine/optim/schedules.py)."""

_UNDECAYED_NAME = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)", re.IGNORECASE)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)


@dataclass(frozen=True)
class Treatment:
    """How one parameter is trained. `names` are all that it has: more than one where it is tied.

    `rule` is its place in `training.parameters`, None where none matches. `weight_decay` is None where the optimizer
    has none, or does not tell its default.
    """

    names: tuple[str, ...]
    parameter: nn.Parameter
    rule: int | None
    is_norm_or_bias: bool
    weight_decay: float | None
    lr_scale: float


def freeze(model: nn.Module, config: RunConfig) -> nn.Module:
    """The model, with the parameters frozen that a rule says are. Raises ConfigError as `treatments` does."""
    rules = config.training.parameters
    for treatment in treatments(model, config):
        if treatment.rule is not None and rules[treatment.rule].frozen:
            treatment.parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("training.parameters: every parameter is frozen: leave some to train")
    return model


def parameter_groups(
    model: nn.Module, config: RunConfig, kept: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The trainable parameters as groups of an optimizer, in an order that is the same on all ranks.

    `kept` says by name what a checkpoint has of the optimizer's state (`ShardedFiles.kept`). ZeRO lays a group's
    parameters end to end and counts one number of steps for them, so those that differ in it stand in groups apart.
    """
    groups: dict[Any, dict[str, Any]] = {}
    for treatment in treatments(model, config):
        if treatment.parameter.requires_grad:
            options: dict[str, Any] = {} if treatment.lr_scale == 1.0 else {LR_SCALE: treatment.lr_scale}
            if treatment.weight_decay is not None:
                options["weight_decay"] = treatment.weight_decay
            key = (*options.items(), (kept or {}).get(treatment.names[0]))
            groups.setdefault(key, {"params": [], **options})["params"].append(treatment.parameter)
    return list(groups.values())


def treatments(model: nn.Module, config: RunConfig) -> list[Treatment]:
    """How each parameter of the model is trained, in the model's order.

    Raises ConfigError for a rule that matches nothing, or that says what the optimizer does not have.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    optimizer, rules = config.deepspeed.optimizer, config.training.parameters
    decay, norms = _weight_decay(optimizer), _in_norms(model)
    found = []
    for parameter, called in names.items():
        index = next((n for n, rule in enumerate(rules) if _match(rule.names, called)), None)
        rule = None if index is None else rules[index]
        spared = parameter in norms or _UNDECAYED_NAME.search(called[0]) is not None
        own = 0.0 if spared and "weight_decay" in optimizer_params(optimizer.type).model_fields else decay
        found.append(
            Treatment(
                names=tuple(called),
                parameter=parameter,
                rule=index,
                is_norm_or_bias=spared,
                weight_decay=own if rule is None or rule.weight_decay is None else rule.weight_decay,
                lr_scale=1.0 if rule is None else rule.lr_scale,
            )
        )
    try:
        _check(config, found, model)
    except ConfigError as error:
        raise ConfigError(f"training.parameters{error}") from error
    return found


def notes_of_resume(model: nn.Module, kept: Mapping[str, Any]) -> list[str]:
    """What to say where parameters are trained that a checkpoint has no optimizer state of, but of others it has."""
    fresh = [p for name, p in model.named_parameters() if p.requires_grad and kept.get(name) == ""]
    if not fresh or not any(kept.values()):
        return []
    elements = sum(parameter.numel() for parameter in fresh)
    return [
        f"note: {len(fresh)} parameters of {elements:,} elements are trained that were not before this checkpoint: "
        "their optimizer state begins afresh"
    ]


def notes_of_earlier_version(model: nn.Module, config: RunConfig) -> list[str]:
    """What to say where a run is resumed that began when norms and biases were decayed like all others."""
    decay = _weight_decay(config.deepspeed.optimizer)
    if not decay or not any(one.is_norm_or_bias and one.weight_decay == 0 for one in treatments(model, config)):
        return []
    rule = json.dumps({"names": ["*"], "weight_decay": decay})
    return [
        "note: the checkpoint is of an earlier version, which decayed norms and biases, too; as the last rule of "
        f"training.parameters, {rule} keeps it so"
    ]


def _check(config: RunConfig, found: list[Treatment], model: nn.Module) -> None:
    names = [name for treatment in found for name in treatment.names]
    optimizer = config.deepspeed.optimizer
    for index, rule in enumerate(config.training.parameters):
        for glob in rule.names:
            if not _match([glob], names):
                raise ConfigError(f"[{index}].names: '{glob}' matches no parameter; {_nearest(glob, names, model)}")
        if not any(treatment.rule == index for treatment in found):
            raise ConfigError(f"[{index}]: rules before it have taken all that it matches: put it first, or remove it")
        if rule.weight_decay is not None and "weight_decay" not in optimizer_params(optimizer.type).model_fields:
            raise ConfigError(f"[{index}].weight_decay: {optimizer.type} has no weight decay: remove the key")
        if rule.lr_scale != 1.0 and optimizer.type.lower() == "muon":
            raise ConfigError(
                f"[{index}].lr_scale: Muon has rates of its own: use muon_lr and adam_lr of the optimizer"
            )


def _match(globs: tuple[str, ...] | list[str], names: list[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs for name in names)


def _nearest(glob: str, names: list[str], model: nn.Module) -> str:
    """The names of parameters and modules that are most like a glob that matches none."""
    modules = {name for name, _ in model.named_modules() if name}
    close = difflib.get_close_matches(glob.strip(".*"), [*names, *modules], n=3, cutoff=0.5) or names[:3]
    return f"nearest: {', '.join(f'{name}.*' if name in modules else name for name in close)}"


def _weight_decay(optimizer: Optimizer) -> float | None:
    """The optimizer's weight decay, configured or by default; None if it has none or does not tell."""
    field = optimizer_params(optimizer.type).model_fields.get("weight_decay")
    value = optimizer.params.get("weight_decay", field.default if field else None)
    return None if value is None else float(value)


def _in_norms(model: nn.Module) -> set[nn.Parameter]:
    return {
        parameter
        for module in model.modules()
        if isinstance(module, _NORMS) or type(module).__name__.endswith("Norm")
        for parameter in module.parameters(recurse=False)
    }


def planned_rules(model: nn.Module, config: RunConfig, lr: float) -> list[dict[str, Any]]:
    """What the plan shows: per rule, how many tensors and elements it covers, their weight decay and highest rate."""
    rows: dict[Any, dict[str, Any]] = {}
    for one in treatments(model, config):
        trained = one.parameter.requires_grad
        row: dict[str, Any] = {
            "rule": "no rule" if one.rule is None else " ".join(config.training.parameters[one.rule].names),
            "norms_and_biases": one.is_norm_or_bias,
            "trained": trained,
            "weight_decay": one.weight_decay if trained else None,
            "learning_rate": lr * one.lr_scale if trained else None,
        }
        row = rows.setdefault((one.rule, *row.values()), row | {"tensors": 0, "elements": 0})
        row["tensors"] += 1
        row["elements"] += one.parameter.numel()
    return list(rows.values())


def tied_names(model: nn.Module, config: RunConfig) -> list[dict[str, Any]]:
    """The names of each parameter that has more than one: what is done to one of them is done to all."""
    return [
        {"names": list(one.names), "trained": one.parameter.requires_grad}
        for one in treatments(model, config)
        if len(one.names) > 1
    ]


def render_rules(rows: list[dict[str, Any]], tied: list[dict[str, Any]]) -> list[str]:
    """The lines of the plan that say how parameters are trained."""
    lines = []
    for row in rows:
        kind = "norms and biases" if row["norms_and_biases"] else "weights"
        decay = "" if row["weight_decay"] is None else f"weight decay {row['weight_decay']:g}, "
        how = f"{decay}lr {row['learning_rate']:.3g}" if row["trained"] else "frozen"
        lines.append(f"parameters  {row['rule']}: {row['tensors']} {kind} of {row['elements']:,} elements, {how}")
    for each in tied:
        lines.append(f"tied        {' = '.join(each['names'])}{'' if each['trained'] else ', frozen'}")
    return lines
