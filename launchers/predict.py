"""Predict with a run's weights: `python launchers/predict.py --run runs/fluid-demo --case CASE --out DIR`.

Further flags are those of the run's workload; `--run DIR --help` lists them.
"""

from __future__ import annotations

import sys

from trunkline.launchers.entry import begin, status_of
from trunkline.launchers.of_run import work_on_run


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 a user's error."""
    return status_of(lambda: work_on_run("predict", __doc__, argv))


if __name__ == "__main__":
    begin("stderr")  # standard output carries the result
    sys.exit(main())
