"""Prepare data for a workload: `python launchers/prepare.py fluid --source ROOT --out DIR`.

`python launchers/prepare.py <workload> --help` shows what a workload offers.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from trunkline.engine.machine.output import keep_printing
    from trunkline.engine.machine.stopping import listen

    keep_printing()
    listen(exit_code=130, advice="run the same command again")

import argparse
import importlib
import sys
from pathlib import Path

from trunkline.engine.errors import TrunklineError
from trunkline.engine.machine.stopping import listen_no_more


def main(argv: list[str] | None = None) -> int:
    """Parse and call the workload's preparation. Returns the exit status: 0 done, 2 a user's error, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    workloads = sorted(
        path.parent.name for path in Path(__file__).resolve().parents[1].joinpath("models").glob("*/prepare.py")
    )
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="workload", required=True, metavar="|".join(workloads))
    for name in workloads:
        command = commands.add_parser(name)
        if name in argv[:1]:  # importing all of them would take seconds
            importlib.import_module(f"trunkline.models.{name}.prepare").add_arguments(command)
    arguments = parser.parse_args(argv)
    listen_no_more()  # a preparation that is interrupted removes its drafts
    try:
        importlib.import_module(f"trunkline.models.{arguments.workload}.prepare").run(arguments)
    except TrunklineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: run the same command again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
