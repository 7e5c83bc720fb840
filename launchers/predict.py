"""Predict with a run's weights: `python launchers/predict.py --run runs/fluid-demo --case CASE --out DIR`.

Further flags are those of the run's workload; `--run DIR --help` lists them.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from trunkline.engine.machine.output import keep_printing
    from trunkline.engine.machine.stopping import listen

    keep_printing("stderr")
    listen(exit_code=130, advice="run the same command again")

import sys

from trunkline.models.registry import enter


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 a user's error."""
    return enter("predict", __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
