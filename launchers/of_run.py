"""What evaluate and predict have in common: the run's workload gives their flags and does the work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

from trunkline.engine.config.flags import Parser
from trunkline.engine.errors import ConfigError
from trunkline.models.registry import add_flags, open_room, workload_of_run, workloads


def work_on_run(
    room: str,
    description: str | None,
    argv: Sequence[str] | None,
    add_arguments: Callable[[Parser, Path | None], None] = lambda parser, run: None,
) -> int:
    """Find the run's workload, parse its flags, call its module `room`. Returns the exit status.

    The module gets --run as a Path and --device as a torch.device, beside its own flags.

    add_arguments: adds the flags that this command has for every workload, beside --run and --device; is told the run
    """
    words = sys.argv[1:] if argv is None else list(argv)
    first = Parser(add_help=False)
    first.add_argument("--run", type=Path)
    run = first.parse_known_args(words)[0].run
    workload = None if run is None else workload_of_run(run)
    parser = Parser(
        description=description,
        epilog=None if workload else _flags_by_workload(room),
        hint=f"the run is one of {workload}" if workload else "",
    )
    parser.add_argument("--run", type=Path, required=True, help="the run's folder, or one with weights, such as best/")
    parser.add_argument("--device", help="cuda or cpu; a GPU where there is one unless given")
    add_arguments(parser, run)
    if workload is None:
        parser.parse_args(words)  # which prints help, or that --run is missing, and ends
        raise AssertionError("--run is required")
    add_flags(workload, room, parser)
    arguments = parser.parse_args(words)

    from trunkline.engine.machine.files import written_to
    from trunkline.engine.machine.hardware import choose_device

    arguments.device = choose_device(arguments.device)
    out = getattr(arguments, "out", None)
    with nullcontext() if out is None else written_to(out):
        return open_room(workload, room).run(arguments)


def _flags_by_workload(room: str) -> str:
    """What --help says where no run is named."""
    lines = ["Further flags, by the workload of the run:"]
    for name in workloads():
        parser = Parser(add_help=False)
        with suppress(ConfigError):  # of a package that has none
            add_flags(name, room, parser)
        lines.append(f"  {name}: {' '.join(sorted(parser.options()))}")
    return "\n".join(lines)
