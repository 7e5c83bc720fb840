"""What every key of a configuration is, in words, from the JSON Schema that the models give.

keys(schema)                        every dotted key: what it may hold, its default, what it means
explained(key, keys)                the same of one key, or of all keys of a section
table(keys), fsdp_table(keys)       in Markdown
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from trunkline.engine.config.fsdp_section import RULES, Obeyed
from trunkline.engine.config.json_object import nearest
from trunkline.engine.errors import ConfigError

Json = dict[str, Any]


@dataclass(frozen=True)
class Key:
    """kinds: what it may hold, in words; default: as JSON, or empty where there is none; meaning: a sentence; owners:
    the optimizers or schedules that it is a parameter of."""

    name: str
    kinds: tuple[str, ...]
    default: str
    meaning: str
    owners: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """What it may hold."""
        return " or ".join(self.kinds)


def keys(schema: Json) -> dict[str, Key]:
    """Every key of the schema of a run, by its dotted name. In the elements of a list it is `parameters[].names`."""
    found: dict[str, Key] = {}
    for key in _walk(schema, schema["$defs"], ""):
        known = found.get(key.name)
        if known is not None:  # a parameter of several optimizers, or what objectives have in common
            meaning = known.meaning
            if key.meaning not in meaning.split("; or: "):
                meaning = f"{meaning}; or: {key.meaning}"
            kinds, owners = dict.fromkeys([*known.kinds, *key.kinds]), (*known.owners, *key.owners)
            key = replace(known, kinds=tuple(kinds), meaning=meaning, default="", owners=owners)
        found[key.name] = key
    return found


def _walk(node: Json, defs: Json, prefix: str) -> Iterator[Key]:
    for name, held in node.get("properties", {}).items():
        if name == "$schema":
            continue
        default = json.dumps(held["default"]) if "default" in held else ""
        inner = list(_objects(held, defs))
        if inner and default.startswith("{"):
            default = "its keys' defaults"
        meaning = held.get("description") or next((each.get("description", "") for each in inner), "")
        yield Key(f"{prefix}{name}", tuple(dict.fromkeys(_kinds(held))), default, " ".join(meaning.split()))
        below = f"{prefix}{name}{'[]' if held.get('type') == 'array' else ''}."
        for each in inner:
            yield from _walk(each, defs, below)
    for branch in node.get("allOf", ()):
        params = branch["then"]["properties"]["params"]
        owners = tuple(branch["if"]["properties"]["type"]["enum"])
        for key in _walk(params, defs, f"{prefix}params."):
            yield replace(key, default="", owners=owners)


def _objects(node: Json, defs: Json) -> Iterator[Json]:
    """The objects of ours that a value may be, or hold as the elements of a list."""
    if "$ref" in node:
        yield defs[node["$ref"].rpartition("/")[2]]
    for branch in [*node.get("anyOf", ()), *node.get("oneOf", ()), *([node["items"]] if "items" in node else [])]:
        yield from _objects(branch, defs)


def _kinds(node: Json) -> list[str]:
    if node == {"const": "auto"}:  # as every key of DeepSpeed's may be, for one that is left out
        return []
    if branches := node.get("anyOf") or node.get("oneOf"):
        return [kind for branch in branches for kind in _kinds(branch)]
    if "const" in node or "enum" in node:
        return [json.dumps(value) for value in node.get("enum", [node.get("const")])]
    if "pattern" in node:
        return ["module:Class"]
    if node.get("format") == "path":
        return ["path"]
    kind = node.get("type", "object" if "$ref" in node else "any value")
    if kind == "object" and node.get("required") == ["epochs"]:
        return ['{"epochs": number}']
    if kind == "array":
        parts = node.get("prefixItems")
        of = [" or ".join(dict.fromkeys(_kinds(each))) for each in parts or [node.get("items", {})]]
        return [f"list of {', '.join(of)}"] if parts else [f"list of {of[0]}"]
    words = {"boolean": "true or false", "string": "text", "null": "null", "object": "object"}
    return [words.get(kind, f"{kind}{_range(node)}")]


def _range(node: Json) -> str:
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    return "".join(f" {word} {node[key]:g}" for key, word in words.items() if key in node)


def explained(asked: str, known: Mapping[str, Key]) -> str:
    """What a key is, with the keys below it. Raises ConfigError for one that is not known, and names the nearest."""
    name = asked.rstrip(".")
    below = [key for each, key in known.items() if each.startswith((f"{name}.", f"{name}[]."))]
    if not name:
        raise ConfigError(
            f"--explain {asked!r}: give a key, such as training.eval_every, or a section, such as training"
        )
    if name not in known:
        raise ConfigError(f"--explain {asked}: unknown key{nearest(name, list(known))}")
    key = known[name]
    lines = [f"{name}: {key.meaning}", f"  type      {key.kind}"]
    lines += [f"  default   {key.default}"] if key.default else []
    lines += [f"  of        {', '.join(key.owners)}"] if key.owners else []
    if (rule := with_fsdp(name)) is not None:
        lines.append(f"  with FSDP {rule}")
    width = max((len(each.name) for each in below), default=0)
    lines += ["  keys:"] * bool(below) + [f"    {each.name:<{width}}  {each.meaning}" for each in below]
    return "\n".join(lines)


def with_fsdp(name: str) -> str | None:
    """What FSDP makes of a key of DeepSpeed's section; None of any other key, which both backends obey alike."""
    key = name.removeprefix("deepspeed.")
    if key == name:
        return None
    rule = None
    while key and rule is None:
        rule = RULES.get(key) or RULES.get(f"{key.rpartition('.')[0]}.*")
        key = key.rpartition(".")[0]
    if rule is None:
        return None
    return f"obeyed: {rule.how}" if isinstance(rule, Obeyed) else f"refused: {rule.instead}"


def table(rows: list[Key], fsdp: bool = False) -> list[str]:
    """Lines of Markdown, with what FSDP does if that is asked for."""
    lines = [f"| key | type | default | meaning |{' with FSDP |' * fsdp}", f"|---|---|---|---|{'---|' * fsdp}"]
    for key in rows:
        cells = [f"`{key.name}`", key.kind, f"`{key.default}`" if key.default else "", key.meaning]
        cells += [with_fsdp(key.name) or ""] if fsdp else []
        lines.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return lines
