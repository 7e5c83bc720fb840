"""What is generated from the models of configurations: docs/configuration.md and configs/<workload>.schema.json.

python -m trunkline.models.reference      writes them into the clone
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trunkline.engine.config.deepspeed_section import REFUSED
from trunkline.engine.config.json_schema import schema
from trunkline.engine.config.reference import Key, keys, table
from trunkline.engine.config.zero_section import REFUSED_ZERO
from trunkline.models.registry import config_sections, workloads

ROOT = Path(__file__).resolve().parents[1]

_INTRODUCTION = """# Every key of a configuration

    python launchers/train.py --explain training.eval_every                        # one key
    python launchers/train.py --explain training                                   # all keys of a section
    python launchers/train.py --config fluid/demo --explain training.eval_every    # also its value and its origin

A run's file has five sections: `workload`, `data`, `model`, `training` and `deepspeed`. A sixth key, `$schema`, is for
editors: it names a JSON Schema, by which they complete and check what is typed, and a run does not look at it. The
schemas are `configs/<workload>.schema.json`.

    {"$schema": "../fluid.schema.json", "workload": "fluid", "data": {...}, ...}

An empty default means that the key has none: it is required, or nothing is set. Paths are relative to where training
starts. Both backends obey the sections `data`, `model` and `training` alike.

This page is made by `python -m trunkline.models.reference`.
"""

_DEEPSPEED = """DeepSpeed's own keys. A key that is left out may also be `"auto"`. One that has no effect on the
run's backend is an error. Sizes of buffers are numbers of elements.
"""


def document() -> str:
    """The page docs/configuration.md."""
    of = {name: keys(schema(name, *config_sections(name))) for name in workloads()}
    shared = next(iter(of.values()))
    lines = [_INTRODUCTION, "## training", "", *table(_below("training", shared)), ""]
    engines = [key for key in _below("deepspeed", shared) if ".params." not in key.name]
    lines += ["## deepspeed", "", _DEEPSPEED, *table(engines, fsdp=True), ""]
    lines += ["These keys of DeepSpeed's are refused on both backends:", "", "| key | use instead |", "|---|---|"]
    refused = REFUSED | {f"zero_optimization.{key}": instead for key, instead in REFUSED_ZERO.items()}
    lines += [f"| `deepspeed.{key}` | {instead} |" for key, instead in refused.items()]
    for part in ("optimizer", "scheduler"):
        lines += ["", f"### Parameters of deepspeed.{part}", "", "| key | type | meaning | of |", "|---|---|---|---|"]
        lines += [
            f"| `{key.name}` | {key.kind} | {key.meaning} | {', '.join(key.owners)} |"
            for key in _below(f"deepspeed.{part}.params", shared)
        ]
    for name, known in of.items():
        lines += ["", f"## {name}", "", *table([*_below("data", known), *_below("model", known)])]
    return "\n".join(lines) + "\n"


def _below(section: str, known: dict[str, Key]) -> list[Key]:
    return [key for name, key in known.items() if name.startswith(f"{section}.")]


def files() -> dict[str, str]:
    """Path below the clone -> text."""
    schemas = {f"configs/{name}.schema.json": _by_line(schema(name, *config_sections(name))) for name in workloads()}
    return {"docs/configuration.md": document()} | schemas


def _by_line(whole: dict[str, Any]) -> str:
    """JSON with a line for each model, so that a change shows where it is."""
    models = ",\n".join(f"{json.dumps(name)}:{_compact(model)}" for name, model in whole["$defs"].items())
    return f"{_compact(whole | {'$defs': {}}).removesuffix('{}}')}{{\n{models}\n}}}}\n"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


if __name__ == "__main__":
    for path, text in files().items():
        (ROOT / path).write_text(text)
