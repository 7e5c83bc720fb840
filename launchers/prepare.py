"""Prepare data for a workload: `python launchers/prepare.py fluid --source ROOT --out DIR`.

`python launchers/prepare.py <workload> --help` shows what a workload offers.
"""

from __future__ import annotations

import sys

from trunkline.engine.config.flags import Parser
from trunkline.engine.machine.stopping import listen_no_more
from trunkline.launchers.entry import begin, status_of
from trunkline.models.registry import add_flags, open_room, workloads


def main(argv: list[str] | None = None) -> int:
    """Parse and call the workload's preparation. Returns the exit status: 0 done, 2 a user's error, 130 interrupted."""
    return status_of(lambda: _prepare(sys.argv[1:] if argv is None else argv))


def _prepare(argv: list[str]) -> None:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="workload", required=True, metavar="|".join(workloads()))
    for name in workloads():
        command = commands.add_parser(name)
        if name in argv[:1]:
            add_flags(name, "prepare", command)
    arguments = parser.parse_args(argv)
    listen_no_more()  # a preparation that is interrupted removes its drafts
    open_room(arguments.workload, "prepare").run(arguments)


if __name__ == "__main__":
    begin()
    sys.exit(main())
