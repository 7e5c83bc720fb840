"""The command that continues this run: the one that was typed, with --resume auto.

    with typed(sys.argv[1:]): ...     said by launchers/train.py, first of all
    resume_with(folder)               "resume with `torchrun --nproc_per_node 2 launchers/train.py ... --resume auto`"

What started the ranks is typed again, too: torchrun and deepspeed are processes that this one descends from, srun is
known by its variables. Where nothing was typed, as in a notebook, the flags alone are named.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from trunkline.engine.machine.stopping import launcher_commands

_command: str | None = None


@contextmanager
def typed(words: Sequence[str]) -> Iterator[None]:
    """Within, `words` after the program's name are what this process was told to train. Begun while its launcher
    lives."""
    global _command
    before = _command
    words = [word for word in words if not word.startswith(("--local_rank=", "--local-rank="))]
    _command = shlex.join([*_program(words), *_without_resume(words), "--resume", "auto"])
    try:
        yield
    finally:
        _command = before


def resume_with(folder: Path) -> str:
    """How to continue the run in `folder`, for a message."""
    return f"resume with `{_command}`" if _command else f"resume with --resume auto --output-dir {folder}"


def _program(words: list[str]) -> list[str]:
    """What was typed before `words`."""
    for command in [*reversed(launcher_commands()), list(sys.orig_argv)]:
        if command[len(command) - len(words) :] == words:  # a daemon on another machine has other words
            before = command[: len(command) - len(words)]
            under_slurm = command == sys.orig_argv and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
            return ["srun"] * under_slurm + _as_typed([word for word in before if not word.startswith("--local_rank=")])
    return ["python", "launchers/train.py"]


def _as_typed(command: list[str]) -> list[str]:
    """Without the interpreter that the first line of a script names, and programs on the path by their names."""
    if len(command) > 1 and Path(command[0]).name.startswith("python") and _is_on_path(command[1]):
        command = command[1:]
    return [Path(command[0]).name if _is_on_path(command[0]) else command[0], *command[1:]]


def _is_on_path(program: str) -> bool:
    return os.path.isabs(program) and shutil.which(Path(program).name) == program


def _without_resume(words: list[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for word in words:
        if not skip and not word.startswith("--resume="):
            kept += [word] if word != "--resume" else []
            skip = word == "--resume"
        else:
            skip = False
    return kept
