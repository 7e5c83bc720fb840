"""Evaluate a run on unseen data: `python launchers/evaluate.py --run runs/fluid-demo`.

Further flags are those of the run's workload; `--run DIR --help` lists them.
"""

from __future__ import annotations

import sys
from pathlib import Path

from trunkline.engine.config.flags import Parser
from trunkline.launchers.entry import begin, status_of
from trunkline.launchers.of_run import work_on_run


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 a user's error."""
    return status_of(lambda: work_on_run("evaluate", __doc__, argv, _add_arguments))


def _add_arguments(parser: Parser, run: Path | None) -> None:
    parser.add_argument("--store", type=Path, help="prepared data set; the one the run was trained on unless given")
    out = None if run is None else run / "evaluation"
    parser.add_argument("--out", type=Path, default=out, help="folder of the results; RUN/evaluation unless given")


if __name__ == "__main__":
    begin()
    sys.exit(main())
