"""A JSON object from a file, and how error messages quote its keys and values. Imports nothing that takes long."""

from __future__ import annotations

import difflib
import errno
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trunkline.engine.errors import ConfigError
from trunkline.engine.machine.reading import MAX_JSON_BYTES, parse_json, read_whole, reason


def read_json_object(path: str | Path, finite: bool = True) -> dict[str, Any]:
    """A JSON file's object, of bounded size and depth. Raises ConfigError, also for repeated keys.

    NaN and Infinity are errors unless `finite` is false.
    """
    path = Path(path)

    def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(whole := dict(pairs)) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in whole if keys.count(key) > 1)
            raise ConfigError(f"{path}: the key '{twice}' stands twice in one object; keep one of them")
        return whole

    try:
        value = parse_json(read_whole(path, MAX_JSON_BYTES), finite, pairs_hook=no_repeats)
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


def nearest(key: str, known: Sequence[str]) -> str:
    """A hint for an error message: those that end with the key, the closest one, or all of them, if they are few."""
    ends = [name for name in known if name.endswith(f".{key}")]
    close = ends[:_NAMED] or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {' or '.join(map(repr, close))}?"
    if len(known) > _LISTED:
        known = list(dict.fromkeys(name.partition(".")[0] for name in known))  # the sections
    return f"; known: {', '.join(sorted(known))}" if known else ""


_NAMED, _LISTED = 4, 100


def show(value: Any) -> str:
    """A value as an error message quotes it: JSON, cut after 80 characters."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
