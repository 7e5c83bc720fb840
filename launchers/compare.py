"""Compare runs: `python launchers/compare.py runs/a runs/b --out comparison`.

Prints a table of how they ended, what they measured, and where their configurations differ. Runs that have not ended,
or are damaged, are compared as far as they can be read.
"""

from __future__ import annotations

import sys
from pathlib import Path

from trunkline.engine.config.flags import Parser
from trunkline.engine.errors import ConfigError
from trunkline.launchers.entry import begin, status_of


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 a user's error."""
    return status_of(lambda: _compare(argv))


def _compare(argv: list[str] | None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folders of two runs or more")
    parser.add_argument("--out", type=Path, help="a folder for compare.md and the curves, compare.png")
    arguments = parser.parse_args(argv)

    from trunkline.engine.record.comparison import comparison, named, write_comparison

    runs = named(arguments.runs)
    if len(runs) < 2:
        raise ConfigError(f"{arguments.runs[0]}: is one run: name the folders of two or more")
    print(comparison(runs), end="")
    if arguments.out is not None:
        print(f"\n{write_comparison(runs, arguments.out)}")


if __name__ == "__main__":
    begin("stderr")  # standard output carries the result
    sys.exit(main())
