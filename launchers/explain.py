"""`launchers/train.py --explain KEY`: what a key of a configuration is and, with a configuration, its present value.

python launchers/train.py --explain training.eval_every
python launchers/train.py --config fluid/demo --set training.eval_every=9 --explain training.eval_every
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from trunkline.engine.config.flags import Parser
from trunkline.engine.errors import ConfigError
from trunkline.launchers.command_line import parse
from trunkline.models.registry import config_sections, workloads


def asked_key(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """What --explain asks for, if it is there, and the other words."""
    parser = Parser(add_help=False)
    parser.add_argument("--explain")
    found, others = parser.parse_known_args(words)
    return found.explain, others


def explain(asked: str, words: Sequence[str]) -> str:
    """What to print, with the words beside --explain. Without any, `data` and `model` keys are those of every workload.

    Raises ConfigError, for an unknown key with the nearest.
    """
    from trunkline.engine.config.draft import value_at
    from trunkline.engine.config.json_schema import schema
    from trunkline.engine.config.reference import explained, keys
    from trunkline.engine.config.run_config import checked

    if not words:
        known = {name: keys(schema(name, *config_sections(name))) for name in workloads()}
        having = {name: found for name, found in known.items() if asked.rstrip(".") in found}
        if not having:
            every = {key: meant for found in known.values() for key, meant in found.items()}
            return explained(asked, every)  # which names the nearest
        said: dict[str, list[str]] = {}
        for name, found in having.items():
            said.setdefault(explained(asked, found), []).append(name)
        return "\n\n".join(
            text if len(names) == len(known) else f"{', '.join(names)}:\n{text}" for text, names in said.items()
        )
    command = parse(words)
    workload = command.file.values.get("workload")
    if not isinstance(workload, str):
        raise ConfigError(f"{command.file.where('workload')}: workload: is missing, so its keys are not known")
    lines = [explained(asked, keys(schema(workload, *config_sections(workload))))]
    if command.arguments.config is not None:
        config = checked(command.draft(1), config_sections)
        key, value = asked.rstrip("."), value_at(config.as_dict(), asked.rstrip("."))
        origin = config.origins.get(key, "")
        where = origin if origin in ("default", "auto") else config.where(key)
        lines.append("  now       not given" if value is None else f"  now       {json.dumps(value)} ({where})")
    return "\n".join(lines)
