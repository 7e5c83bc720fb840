"""Every object that a person can write into a configuration is strict, in the engine and in each workload."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from trunkline.engine.config.deepspeed_section import DeepSpeedSection
from trunkline.engine.config.run_config import Training
from trunkline.models.registry import config_sections, workloads

FREE = {"Optimizer.params", "Scheduler.params"}  # typed by trunkline.engine.config.typed_params
ROOTS = {
    "training": Training,
    "deepspeed": DeepSpeedSection,
    **{
        f"{name}.{part}": model
        for name in workloads()
        for part, model in zip(("data", "model"), config_sections(name), strict=True)
    },
}


def inside(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of: of unions, lists, Annotated and what is in them."""
    yield annotation
    for argument in typing.get_args(annotation):
        yield from inside(argument)


def models_in(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for kind in inside(field.annotation):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from models_in(kind)


@pytest.mark.parametrize("root", ROOTS)
def test_every_object_is_strict_and_none_takes_just_anything(root: str) -> None:
    for model in models_in(ROOTS[root]):
        for setting, wanted in {"extra": "forbid", "strict": True, "frozen": True, "allow_inf_nan": False}.items():
            assert model.model_config.get(setting) == wanted, (model, setting)
        for name, field in model.model_fields.items():
            if f"{model.__name__}.{name}" not in FREE:
                kinds = list(inside(field.annotation))
                assert not {Any, dict, object} & {typing.get_origin(kind) or kind for kind in kinds}, (model, name)


def test_the_walk_reaches_branches_of_unions_and_nested_objects() -> None:
    found = {model.__name__ for root in ROOTS.values() for model in models_in(root)}
    assert {"DPO", "SFT", "EarlyStopping", "Throughput", "OffloadParam", "LeafModule", "FluidModel"} <= found
