"""Strict JSON: objects from files, checked against a model, with helpful errors.

An unknown key is an error that names the nearest known one, and so is a value of the wrong type; nothing is dropped.
A number without a fraction is an integer however it is written: 5e8 and 500000000 are one value.
"""

from __future__ import annotations

import difflib
import errno
import json
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

from trunkline.engine.errors import ConfigError
from trunkline.engine.machine.reading import MAX_JSON_BYTES, parse_json, read_whole, reason

Model = TypeVar("Model", bound=BaseModel)


class Strict(BaseModel):
    """A section of the configuration: unknown keys and wrong types are errors."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, protected_namespaces=(), allow_inf_nan=False, validate_default=True
    )


def read_json_object(path: str | Path) -> dict[str, Any]:
    """A JSON file's object, of bounded size and depth; repeated keys, NaN, Infinity are errors. Raises ConfigError."""
    path = Path(path)

    def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(whole := dict(pairs)) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in whole if keys.count(key) > 1)
            raise ConfigError(f"{path}: the key '{twice}' stands twice in one object; keep one of them")
        return whole

    try:
        value = parse_json(read_whole(path, MAX_JSON_BYTES), pairs_hook=no_repeats)
    except OSError as error:
        remedy = "this is not a configuration" if error.errno == errno.EFBIG else "check the path"
        raise ConfigError(f"{path}: cannot be read ({reason(error)}); {remedy}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a JSON text in UTF-8 ({type(error).__name__})") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object {{...}}, found {show(value)}")
    return value


def validated(model: type[Model], section: Any, name: str, path: str | Path) -> Model:
    """`section` of the file `path` as a `model`. Raises ConfigError with one line for every mistake in it."""
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: {name}: expected an object {{...}}, found {show(section)}")
    try:
        return model.model_validate_json(json.dumps(_integral(section)))
    except RecursionError as error:
        raise ConfigError(f"{path}: {name}: objects are nested too deeply") from error
    except ValidationError as error:
        lines = [_explain(model, issue, name) for issue in error.errors()]
        raise ConfigError("\n".join(f"{path}: {line}" for line in dict.fromkeys(lines))) from error


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


def _explain(model: type[BaseModel], issue: Any, name: str) -> str:
    parts, known = _in_the_file(model, issue["loc"])
    key = ".".join([name, *parts])
    if issue["type"] == "extra_forbidden":
        return f"{key}: unknown key{nearest(parts[-1], known)}"
    if issue["type"] == "missing":
        what = "the list needs this value too" if isinstance(issue["loc"][-1], int) else "this key is required"
        return f"{key}: missing; {what}"
    if issue["type"] == "told":
        return f"{key}: {issue['msg']}"
    if issue["input"] == "auto":
        return f'{key}: nothing decides "auto" here; write the value that is meant, or remove the key'
    if issue["type"] == "value_error":
        return (
            f"{key}: {issue['ctx']['error']}"
            if not parts
            else f"{key}: {issue['ctx']['error']}, found {show(issue['input'])}"
        )
    return f"{key}: {issue['msg'][0].lower()}{issue['msg'][1:]}, found {show(issue['input'])}"


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


def nearest(key: str, known: Sequence[str]) -> str:
    """A hint for an error message: the closest known key, or all of them."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known keys: {', '.join(sorted(known))}" if known else ""


def show(value: Any) -> str:
    """A value as an error message quotes it: JSON, cut after 80 characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
