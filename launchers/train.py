"""Train a run: `deepspeed --num_gpus N launchers/train.py --config configs/<workload>/<name>.json`.

Without DeepSpeed: `torchrun --nproc_per_node N launchers/train.py --config ... --backend fsdp`.
One GPU or none: `python launchers/train.py --config ...` does the same on a single process.
Without a configuration file: `python launchers/train.py WORKLOAD [flags]` trains with the workload's defaults.
`WORKLOAD --help` and `--config FILE --help` list the workload's own flags, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from trunkline.engine.errors import ConfigError, TrunklineError
from trunkline.engine.machine.again import resume_with, typed
from trunkline.engine.machine.stopping import EXIT_CODE
from trunkline.launchers.command_line import parse
from trunkline.launchers.entry import begin, leave, status_of
from trunkline.launchers.explain import asked_key, explain
from trunkline.models.registry import config_sections, onnx_writer, planned_task

if TYPE_CHECKING:
    from trunkline.engine.config.run_config import RunConfig


def main(argv: list[str] | None = None) -> int:
    """Parse, assemble, train. Returns the exit status: 0 done, 2 a user's error, 75 stopped and worth resuming."""
    words = sys.argv[1:] if argv is None else argv
    with typed(words):
        return status_of(lambda: _run(words), on_error=_tell)


def _tell(error: Exception) -> None:
    """Let the ranks know that wait at the start for this one."""
    from trunkline.engine.ranks.launch import read_launch

    with contextlib.suppress(TrunklineError):
        if read_launch().world_size > 1:
            from trunkline.engine.ranks.agreement import tell

            tell(error)


def _run(words: list[str]) -> int | None:
    key, others = asked_key(words)
    if key is not None:
        print(explain(key, others))
        return 0
    command = parse(words, __doc__)
    arguments = command.arguments

    # imported late, as below: PyTorch and DeepSpeed take seconds, and a wrong flag should be named at once
    from trunkline.engine.config.run_config import checked
    from trunkline.engine.ranks.distributed import launched_world_size

    world_size = launched_world_size()  # a launch that does not fit together is named before the configuration is
    if arguments.world_size is not None:
        if not arguments.plan:
            raise ConfigError(f"--world-size {arguments.world_size}: only with --plan; the launcher sets it for a run")
        if (world_size := arguments.world_size) < 1:
            raise ConfigError(f"--world-size {world_size}: give the number of ranks to plan for, 1 or more")
    if arguments.samples is not None and (not arguments.plan or arguments.samples < 1):
        raise ConfigError(f"--samples {arguments.samples}: only with --plan, the number of samples to plan for, from 1")
    config = checked(command.draft(world_size), config_sections)
    folder = arguments.output_dir or Path("runs") / config.workload / command.name
    if arguments.instead and not arguments.plan:
        launcher, *flags = arguments.instead
        return int(import_module(f"trunkline.launchers.{launcher}").main(["--run", str(folder), *flags]))
    _plan(arguments, config, world_size) if arguments.plan else _train(arguments, config, folder)
    return None


def _train(arguments: argparse.Namespace, config: RunConfig, folder: Path) -> None:
    from trunkline.engine.checkpoint.best import BEST
    from trunkline.engine.checkpoint.weights import WEIGHTS
    from trunkline.engine.ranks.launch import read_launch
    from trunkline.launchers.api import train

    write_onnx = onnx_writer(config.workload) if arguments.onnx else None
    train(
        config, output_dir=folder, backend=arguments.backend,
        resume=str(folder) if arguments.resume is True else "none" if arguments.resume is None else arguments.resume,
        accept_new_data=arguments.accept_new_data, find_micro_batch=arguments.find_micro_batch,
    )  # fmt: skip
    if write_onnx is not None and read_launch().rank == 0 and (folder / BEST / WEIGHTS).exists():
        write_onnx(folder / BEST)


def _plan(arguments: argparse.Namespace, config: RunConfig, world_size: int) -> None:
    from trunkline.engine.plan_text import render_plan
    from trunkline.engine.preview import preview

    backend = "fsdp" if arguments.backend == "fsdp" else "deepspeed"
    with config.naming_origins():
        plan = preview(planned_task(config), config, world_size, backend, arguments.samples)
    print(json.dumps(plan, indent=2) if arguments.plan == "json" else render_plan(plan))


def _leave_group() -> None:
    """Leave the process group, if there still is one."""
    if "torch" in sys.modules:
        from trunkline.engine.ranks.distributed import stop

        stop()


if __name__ == "__main__":
    with typed(sys.argv[1:]):
        begin(exit_code=EXIT_CODE, advice=f"with no step under way: nothing is lost; {resume_with(Path())}")
    status = main()
    _leave_group()
    leave(status)
