"""The launchers as one program, `trunkline <command> [flags]`, for where there is no clone. This module stays light."""

from __future__ import annotations

import runpy
import sys

COMMANDS = {
    "prepare": "make a workload's data set",
    "train": "train a run from its configuration, or resume it",
    "evaluate": "evaluate a run on data that it was not trained on",
    "predict": "predict with a run's weights",
    "compare": "set runs beside each other: what they reached, and how they differ",
    "export": "write a checkpoint's weights as safetensors",
    "doctor": "say whether training can start on this machine",
    "new-workload": "write a package with a workload of your own",
    "bench": "measure; only in a clone of the repository",
}
"""Name -> what it does. trunkline.launchers.<name> is the program, with _ for -."""


def main() -> int:
    """Be the launcher that is named. Returns the exit status if none is: 0 for --help, 2 for a user's error."""
    command, *flags = sys.argv[1:] or [""]
    if command in COMMANDS:
        sys.argv = [f"trunkline {command}", *flags]
        runpy.run_module(f"trunkline.launchers.{command.replace('-', '_')}", run_name="__main__")
    elif command in ("-h", "--help"):
        print(_usage())
    else:
        print(f"{_usage()}\n\nerror: {f'no command {command!r}' if command else 'name a command'}", file=sys.stderr)
        return 2
    return 0


def _usage() -> str:
    lines = "\n".join(f"  {name:<14}{what}" for name, what in COMMANDS.items())
    return f"usage: trunkline <command> [flags]\n\n{lines}\n\ntrunkline <command> --help lists its flags."


if __name__ == "__main__":
    sys.exit(main())
