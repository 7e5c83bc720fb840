"""Predict with a run's weights: `python launchers/predict.py --run runs/fluid-demo --case CASE --out DIR`.

Further flags are those of the run's workload; `--run DIR --help` lists them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engine.errors import TrunklineError
from engine.impostors import refuse_shadowed
from models.registry import workload_of_run


def main(argv: list[str] | None = None) -> int:
    """Find the run's workload, parse its flags, call it. Returns the exit status: 0 done, 2 a user's error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    parser.add_argument("--run", type=Path, required=True, help="the run's folder, or one with weights, such as best/")
    known, _ = parser.parse_known_args(argv)
    try:
        refuse_shadowed()
        predict = workload_of_run(known.run).open("predict")
        parser.add_argument("-h", "--help", action="help", help="show this and exit")
        predict.add_arguments(parser)
        return predict.run(parser.parse_args(argv))
    except TrunklineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
