"""A JSON Schema (2020-12) of a workload's whole configuration, for editors and other programs.

    schema("fluid", Data, Model)      what a run's file may hold, made from the models that check it

It knows keys, types, ranges and choices, also the parameters of each optimizer and schedule. What several keys say
together is checked by a run alone. `configs/<workload>.schema.json` hold these schemas:

    python -m trunkline.models.reference
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from trunkline.engine.config.deepspeed_parts import Part
from trunkline.engine.config.deepspeed_section import DeepSpeedSection, Optimizer, Scheduler
from trunkline.engine.config.run_config import SECTIONS, Training
from trunkline.engine.config.typed_params import (
    optimizer_params,
    scheduler_params,
    writable_optimizers,
    writable_schedulers,
)

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_OWN_CLASS = r"^[\w.]+:\w+$"


def schema(workload: str, data: type[BaseModel], model: type[BaseModel]) -> dict[str, Any]:
    """The schema of a run's file of this workload."""
    models: dict[str, type[BaseModel]] = {
        "data": data, "model": model, "training": Training, "deepspeed": DeepSpeedSection,
    }  # fmt: skip
    found, shared = models_json_schema([(each, "validation") for each in models.values()], schema_generator=_Generator)
    sections = {name: found[each, "validation"] for name, each in models.items()}
    return {
        "$schema": DIALECT,
        "title": f"A run of {workload}",
        "type": "object",
        "additionalProperties": False,
        "required": list(SECTIONS),
        "properties": {
            "$schema": {"type": "string", "description": "This schema, for editors. A run does not look at it."},
            "workload": {"const": workload, "description": "What is trained."},
            **sections,
        },
        "$defs": shared["$defs"],
    }


class _Generator(GenerateJsonSchema):
    """As pydantic's, with what only our validators know."""

    def model_schema(self, schema: Any) -> dict[str, Any]:
        made = super().model_schema(schema)
        properties, kind = made.get("properties", {}), schema["cls"]
        for name, property_ in properties.items():
            property_.pop("title", None)
            if property_.get("default", "") is None:
                del property_["default"]
            if issubclass(kind, Part):
                if name in kind.left_out and kind.left_out[name] != "auto":
                    property_["default"] = kind.left_out[name]
                if name not in made.get("required", []):
                    _or_auto(property_)
        if kind is Optimizer:
            made |= _by_type(properties, {name: optimizer_params(name) for name in writable_optimizers()}, ("lr",))
        if kind is Scheduler:
            made |= _by_type(properties, {name: scheduler_params(name) for name in writable_schedulers()})
        return made


def _or_auto(property_: dict[str, Any]) -> None:
    """In DeepSpeed's sections a key that is "auto" is one that is left out."""
    rules = {key: property_.pop(key) for key in list(property_) if key not in ("description", "default")}
    branches = rules["anyOf"] if rules.keys() == {"anyOf"} else [rules]
    property_["anyOf"] = [*branches, *([{"const": "auto"}] if {"const": "auto"} not in branches else [])]


def _by_type(
    properties: dict[str, Any], params: dict[str, type[BaseModel]], required: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The known names of `type`, and what `params` may hold with each of them."""
    properties["type"] |= {"anyOf": [{"enum": list(params)}, {"pattern": _OWN_CLASS}]}
    branches: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name, model in params.items():
        of = model.model_json_schema(schema_generator=_Generator)
        of.pop("title")
        of.pop("description", None)
        branches.setdefault(str(of), (of, []))[1].append(name)
    needs = {"required": ["params"]} if required else {}
    return {
        "allOf": [
            {"if": {"properties": {"type": {"enum": names}}}, "then": {"properties": {"params": of}, **needs}}
            for of, names in branches.values()
        ]
    }
