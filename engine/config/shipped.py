"""The configurations that come with Trunkline, which `fluid/demo` names wherever it is installed."""

from __future__ import annotations

from pathlib import Path

from trunkline.engine.errors import ConfigError

_FOLDER = Path(__file__).parents[2] / "configs"


def find_config(path: str | Path) -> Path:
    """`path` itself, or the shipped file that it names where there is no such file. Raises ConfigError for neither."""
    path = Path(path)
    if path.suffix or (path.exists() and not path.is_dir()):
        return path
    shipped = {str(file.relative_to(_FOLDER).with_suffix("")): file for file in sorted(_FOLDER.glob("*/*.json"))}
    if str(path) not in shipped:
        raise ConfigError(f"{path}: neither a file nor one of the shipped configurations: {', '.join(shipped)}")
    return shipped[str(path)]
