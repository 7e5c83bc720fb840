"""The configurations that come with Trunkline, which `fluid/demo` names wherever it is installed."""

from __future__ import annotations

import json
from pathlib import Path

from trunkline.engine.config.json_object import nearest
from trunkline.engine.errors import ConfigError

_FOLDER = Path(__file__).parents[2] / "configs"


def shipped() -> dict[str, str]:
    """Name -> what it trains, in a few words."""
    about: dict[str, str] = json.loads((_FOLDER / "about.json").read_text())
    return {name: about.get(name, "") for name in _files()}


def find_config(path: str | Path) -> Path:
    """`path` itself, or the shipped file that it names where there is no such file. Raises ConfigError for neither."""
    path = Path(path)
    if path.suffix or (path.exists() and not path.is_dir()):
        return path
    files = _files()
    if str(path) not in files:
        raise ConfigError(f"{path}: neither a file nor one of the shipped configurations{nearest(str(path), [*files])}")
    return files[str(path)]


def _files() -> dict[str, Path]:
    return {str(file.relative_to(_FOLDER).with_suffix("")): file for file in sorted(_FOLDER.glob("*/*.json"))}
