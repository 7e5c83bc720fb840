"""Strict JSON: objects from files, checked against a model, with helpful errors.

An unknown key is an error that names the nearest known one, and so is a value of the wrong type; nothing is dropped.
A number without a fraction is an integer however it is written: 5e8 and 500000000 are one value.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

from trunkline.engine.config.json_object import nearest, read_json_object, show
from trunkline.engine.errors import ConfigError

__all__ = ["Strict", "nearest", "read_json_object", "show", "typed", "validated"]

Model = TypeVar("Model", bound=BaseModel)


class Strict(BaseModel):
    """A section of the configuration: unknown keys and wrong types are errors."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, protected_namespaces=(), allow_inf_nan=False, validate_default=True
    )


def validated(model: type[Model], section: Any, name: str, source: str | Path | Callable[[str], str]) -> Model:
    """`section` as a `model`. Raises ConfigError with one line for every mistake in it.

    source: the file that all of it is from, or what says of each dotted key where its value is from
    """
    where = source if callable(source) else lambda key: str(source)
    if not isinstance(section, dict):
        raise ConfigError(f"{where(name)}: {name}: expected an object {{...}}, found {show(section)}")
    try:
        return model.model_validate_json(json.dumps(_integral(section)))
    except RecursionError as error:
        raise ConfigError(f"{where(name)}: {name}: objects are nested too deeply") from error
    except ValidationError as error:
        mistakes = [_explain(model, issue, name) for issue in error.errors()]
        lines = [f"{where(key)}: {key}: {said}" for key, said in mistakes]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error


def _integral(value: Any) -> Any:
    """The value with each float that has no fraction as an integer, which a float's place takes too."""
    if isinstance(value, dict):
        return {key: _integral(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_integral(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


def typed(model: type[BaseModel], values: dict[str, Any], owner: str) -> dict[str, Any]:
    """The values that were given, as `model` has them; for use in a validator of a section that holds them.

    Raises ValidationError, whose lines name the place of each value; an unknown key is called unknown to `owner`.
    """
    try:
        return model.model_validate_json(json.dumps(values)).model_dump(mode="json", exclude_unset=True)
    except ValidationError as error:
        lines: list[Any] = []
        for issue in error.errors(include_url=False):
            kind: Any = issue["type"]
            if kind == "extra_forbidden":
                hint = nearest(str(issue["loc"][-1]), list(model.model_fields))
                kind = PydanticCustomError("told", "{text}", {"text": f"unknown to {owner}{hint}"})
            lines.append({"type": kind, "loc": issue["loc"], "input": issue["input"], "ctx": issue.get("ctx", {})})
        raise ValidationError.from_exception_data(model.__name__, lines) from error


def _explain(model: type[BaseModel], issue: Any, name: str) -> tuple[str, str]:
    """The dotted key of a mistake, and what is wrong with it."""
    parts, known = _in_the_file(model, issue["loc"])
    found = f", found {show(issue['input'])}"
    if issue["type"] == "extra_forbidden":
        said = f"unknown key{nearest(parts[-1], known)}"
    elif issue["type"] == "missing":
        what = "the list needs this value too" if isinstance(issue["loc"][-1], int) else "this key is required"
        said = f"missing; {what}"
    elif issue["type"] == "told":
        said = issue["msg"]
    elif issue["input"] == "auto":
        said = 'nothing decides "auto" here; write the value that is meant, or remove the key'
    elif issue["type"] == "value_error":
        said = f"{issue['ctx']['error']}{found if parts else ''}"
    else:
        said = f"{issue['msg'][0].lower()}{issue['msg'][1:]}{found}"
    return ".".join([name, *parts]), said


def _in_the_file(model: type[BaseModel], loc: Sequence[Any]) -> tuple[list[str], list[str]]:
    """The keys of pydantic's location that stand in the user's file, and those known where the last of them stands.

    What is left out are the names of union branches, and the tags by which a union is told apart.
    """
    parts: list[str] = []
    models: list[type[BaseModel]] = [model]
    known: list[str] = []
    tagged = False
    for part in loc:
        if tagged:
            models = [branch for branch in models if part in _tags(branch)] or models
            tagged = False
        elif not _is_branch(part):
            parts.append(str(part))
            known = [key for each in models for key in each.model_fields]
            fields = [each.model_fields[part] for each in models if part in each.model_fields]
            models = [each for field in fields for each in _nested(field.annotation)]
            tagged = any(field.discriminator is not None for field in fields)
    return parts, known


def _nested(annotation: Any) -> list[type[BaseModel]]:
    branches = typing.get_args(annotation) or (annotation,)
    return [each for each in branches if isinstance(each, type) and issubclass(each, BaseModel)]


def _tags(model: type[BaseModel]) -> list[Any]:
    return [value for field in model.model_fields.values() for value in typing.get_args(field.annotation)]


def _is_branch(part: Any) -> bool:
    return isinstance(part, str) and (
        part in {"int", "float", "bool", "str", "none", "json-or-python"} or any(mark in part for mark in "[(-")
    )
