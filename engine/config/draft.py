"""A configuration that is put together: values on top of one another, and where each of them is from.

    draft = Draft.read("run.json")
    draft.assign("training.epochs", 5, origin="--epochs")
    draft.set("training.seed=1")                             from --set, which wins because it comes last
    draft.where("training.seed") == "--set"                  what a message about the value begins with

trunkline.engine.config.run_config checks the result. This module imports nothing that takes long.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trunkline.engine.config.json_object import read_json_object, show
from trunkline.engine.config.shipped import find_config
from trunkline.engine.errors import ConfigError

COMMAND_LINE = "command line"
"""The origin of what --set has set. That of a flag is the flag."""
SETTINGS = "settings"
"""The origin of what a Python program has set on top of a file."""

EDITORS = "$schema"
"""A key beside the sections that names a JSON Schema for editors. It is left out of the draft."""


class Draft:
    """values: sections as they are in a file; source: the file; origins: dotted key -> where its value is from; notes:
    what to say of them when the run starts."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self.values, self.source = {key: value for key, value in values.items() if key != EDITORS}, source
        if not isinstance(values.get(EDITORS, ""), str):
            raise ConfigError(f"{source}: {EDITORS}: expected a path or an address, found {show(values[EDITORS])}")
        self.origins = dict.fromkeys(leaves(self.values), "file")
        self.notes: list[str] = []

    @classmethod
    def read(cls, path: str | Path, deepspeed: str | Path | None = None) -> Draft:
        """From a run's file, or a shipped one by its name. A DeepSpeed file takes the place of its section.

        Raises ConfigError.
        """
        path = find_config(path)
        draft = cls(read_json_object(path), str(path))
        if deepspeed is not None:
            draft.assign("deepspeed", read_json_object(deepspeed), str(deepspeed))
        return draft

    def assign(self, key: str, value: Any, origin: str) -> None:
        """Set a dotted key; None is JSON's null. Raises ConfigError where something else than an object holds it."""
        *parents, last = key.split(".")
        target = self.values
        for depth, part in enumerate(parents):
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                held = ".".join(parents[: depth + 1])
                who = f"--set {key}" if origin == COMMAND_LINE else origin
                raise ConfigError(f"{who}: '{held}' holds {show(target)}, which has no keys; set '{held}' itself")
        target[last] = value
        held_by = {".".join(parents[: depth + 1]) for depth in range(len(parents))}
        self.origins = {
            known: source
            for known, source in self.origins.items()
            if known != key and not known.startswith(f"{key}.") and known not in held_by
        }
        self.origins |= dict.fromkeys(leaves(value, key) if isinstance(value, dict) and value else [key], origin)

    def set(self, setting: str) -> None:
        """Do what "--set dotted.key=value" says; the value is JSON, or else plain text. Raises ConfigError."""
        key, equals, text = setting.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"--set {setting}: expected dotted.key=value, such as --set training.seed=1")
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            value = text
        self.assign(key, value, COMMAND_LINE)

    def where(self, key: str) -> str:
        """What a message about a dotted key begins with: where its value came from."""
        return whence(key, self.origins, self.source)


def whence(key: str, origins: Mapping[str, str], source: str) -> str:
    """The file, flag or --set that a dotted key's value is from; of an object, all that have a part in it.

    Of a key that is not there, the same of what should hold it.
    """
    parts = key.split(".")
    for depth in range(len(parts), 0, -1):
        held = ".".join(parts[:depth])
        if held in origins:
            return _place(held, origins[held], source)
        if inside := [name for name in origins if name.startswith(f"{held}.")]:
            places = {name: _place(name, origins[name], source) for name in inside}
            files = [place for place in places.values() if not place.startswith("--")]
            typed = [f"--set {name}" if place == "--set" else place for name, place in places.items()]
            typed = list(dict.fromkeys(place for place in typed if place.startswith("--")))
            return " with ".join([*files[:1], ", ".join(typed)] if typed else files[:1])
    return source


def _place(key: str, origin: str, source: str) -> str:
    if origin == COMMAND_LINE:
        return "--set"
    if origin == SETTINGS:
        return SETTINGS
    other_file = key.startswith("deepspeed.") and origin not in ("file", "default", "auto")
    return origin if origin.startswith("--") or other_file else source


def value_at(values: Any, key: str) -> Any:
    """What a dotted key holds; None if it is not there."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def leaves(values: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of all values that are not objects, and of empty objects."""
    keys: list[str] = []
    for key, item in values.items():
        dotted = f"{prefix}.{key}" if prefix else key
        keys += leaves(item, dotted) if isinstance(item, dict) and item else [dotted]
    return keys
