"""Write a package with a workload of your own: `python launchers/new_workload.py NAME`.

It trains, evaluates and predicts once it is installed. launchers/skeleton is what is copied, under another name.
"""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from pathlib import Path

from trunkline.engine.config.flags import Parser
from trunkline.engine.errors import ConfigError
from trunkline.launchers.entry import begin, status_of
from trunkline.models.registry import workloads

_SKELETON = Path(__file__).with_name("skeleton")
_PLACES = {"pyproject.toml": "", "README.md": "", "test_skeleton.py": "tests"}
"""File -> folder, of what stands beside the package."""


def main(argv: list[str] | None = None) -> int:
    """Parse and write. Returns the exit status: 0 done, 2 a user's error."""
    return status_of(lambda: _write(sys.argv[1:] if argv is None else argv))


def _write(argv: list[str]) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("name", metavar="NAME", help="of the workload and its package, such as tides")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the new folder; NAME unless given")
    arguments = parser.parse_args(argv)
    name, out = arguments.name, arguments.out or Path(arguments.name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: is there already, and nothing is overwritten: choose another folder")
    _check(name)
    for source in sorted(_SKELETON.iterdir()):
        if source.is_file():
            target = out / _PLACES.get(source.name, name) / source.name.replace("skeleton", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = source.read_text().replace("trunkline.launchers.skeleton", name).replace("skeleton", name)
            target.write_text(text.replace("Skeleton", name.title().replace("_", "")))
    print(
        f"wrote the package {name} into {out}; try it:\n"
        f"  pip install -e {out}\n"
        f"  trunkline train {name} --output-dir runs/{name}\n"
        f"  trunkline evaluate --run runs/{name}\n"
        f"then read {out / 'README.md'}"
    )


def _check(name: str) -> None:
    """Raises ConfigError for a name that no package can have, or that is taken."""
    if not re.fullmatch("[a-z]([a-z0-9_]*[a-z0-9])?", name) or keyword.iskeyword(name):
        better = re.sub("[^a-z0-9]+", "_", name.lower()).strip("_0123456789")
        hint = f", such as {better}" if better and not keyword.iskeyword(better) else ""
        raise ConfigError(f"NAME {name!r}: give small letters, digits and _, and no word of Python's{hint}")
    if name in workloads():
        raise ConfigError(f"NAME {name!r}: there is a workload of that name: choose another")
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.origin is not None:  # a folder without __init__.py has none
        raise ConfigError(f"NAME {name!r}: there is a module of that name, {spec.origin}: choose another")


if __name__ == "__main__":
    begin()
    sys.exit(main())
