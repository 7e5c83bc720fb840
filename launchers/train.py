"""Train a run: `deepspeed --num_gpus N launchers/train.py --config configs/<workload>/<name>.json`.

Without DeepSpeed: `torchrun --nproc_per_node N launchers/train.py --config ... --backend fsdp`.
One GPU or none: `python launchers/train.py --config ...` does the same on a single process.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from trunkline.engine.machine.output import keep_printing
    from trunkline.engine.machine.stopping import listen

    keep_printing()
    listen()

import argparse
import json
import os
import sys
from pathlib import Path

from trunkline.engine.config.run_config import RunConfig, load_config
from trunkline.engine.errors import ConfigError, DataError, TrunklineError
from trunkline.engine.machine.stopping import EXIT_CODE
from trunkline.engine.ranks.agreement import agree, tell
from trunkline.engine.ranks.distributed import launched_world_size, lost_a_rank, start, stop
from trunkline.models.registry import WORKLOADS, config_sections, make_task


def main(argv: list[str] | None = None) -> int:
    """Parse, assemble, train. Returns the exit status: 0 done, 2 a user's error, 75 stopped and worth resuming."""
    arguments = _parser().parse_args(argv)
    try:
        return _train(arguments)
    except Exception as error:
        status = _explain(error)
        tell(error)  # the ranks that wait at the start for this one
        if status is None:
            raise
        return status


def _explain(error: Exception) -> int | None:
    """Print what a person can act on, and return the exit status; None for an error of the program."""
    if lost_a_rank(error):
        error = TrunklineError(f"another rank has ended during the start, so this one stops: {str(error)[:200]}")
    if not isinstance(error, TrunklineError):
        return None
    from trunkline.engine.trainer import InterruptedRunError

    stopped = isinstance(error, InterruptedRunError)
    rank = os.environ.get("RANK", "0")
    where = f"rank {rank}: " if rank != "0" else ""  # an error may be one rank's alone, so each says its own
    print(f"{where}{'stopped' if stopped else 'error'}: {error}", file=sys.stderr, flush=True)
    return EXIT_CODE if stopped else 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, help="the run's JSON file")
    parser.add_argument("--output-dir", type=Path, help="the run's folder; default runs/<workload>/<name of the file>")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a.b=c wins over the file")
    parser.add_argument("--deepspeed", type=Path, metavar="FILE", help="a DeepSpeed file in place of the section")
    parser.add_argument("--backend", default="auto", help="deepspeed, fsdp, or auto (default)")
    parser.add_argument("--resume", default="none", metavar="none|auto|PATH", help="auto: the newest good checkpoint")
    parser.add_argument(
        "--find-micro-batch", action="store_true", help="first find the largest micro-batch that fits, by trying"
    )
    parser.add_argument("--accept-new-data", action="store_true", help="resume although the data set has changed")
    parser.add_argument(
        "--plan", nargs="?", const="text", choices=["text", "json"], help="show the plan, train nothing"
    )
    parser.add_argument("--world-size", type=int, help="with --plan: the number of ranks to plan for")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    flags = {flag: key for workload in WORKLOADS.values() for flag, key in workload.flags.items()}
    for flag, key in flags.items():
        parser.add_argument(flag, dest=f"set {key}", metavar="VALUE", help=f"same as --set {key}=VALUE")
    return parser


def _train(arguments: argparse.Namespace) -> int:
    launched_world_size()  # a launch that does not fit together is named before anything else is
    flags = {key.removeprefix("set "): value for key, value in vars(arguments).items() if key.startswith("set ")}
    settings = [f"{key}={value}" for key, value in flags.items() if value is not None] + arguments.set
    config = load_config(arguments.config, sections=config_sections, settings=settings, deepspeed=arguments.deepspeed)
    if arguments.plan:
        return _plan(arguments, config)
    if arguments.world_size is not None:
        raise ConfigError(f"--world-size {arguments.world_size}: only with --plan; the launcher sets it for a run")

    # imported late: DeepSpeed takes seconds, and a wrong configuration should be named at once
    from trunkline.engine.backends import choose_backend
    from trunkline.engine.checkpoint.best import outcome
    from trunkline.engine.record.report import write_report
    from trunkline.engine.trainer import Trainer
    from trunkline.engine.trials import find_micro_batch

    backend = choose_backend(arguments.backend)
    folder = arguments.output_dir or Path("runs") / config.workload / arguments.config.stem
    limit_s = config.training.hang_timeout_s
    ranks = start(limit_s)
    agree({"--find-micro-batch": arguments.find_micro_batch})
    trainer = Trainer(
        make_task(config), config, ranks, folder,
        backend=backend, resume=arguments.resume, accept_new_data=arguments.accept_new_data,
    )  # fmt: skip
    if arguments.find_micro_batch:
        with trainer.starting():
            find_micro_batch(trainer)
    progress = trainer.run()
    if ranks.is_main:
        best = trainer.config.training.best
        try:
            report = str(write_report(folder).relative_to(folder))
        except (OSError, DataError) as error:  # the run is done all the same
            report = (
                f"no report ({error}); `python -m trunkline.engine.record.report {folder}` writes it once there is room"
            )
        print(f"done: {folder} holds {outcome(folder, best, progress, report)}")
    return 0


def _plan(arguments: argparse.Namespace, config: RunConfig) -> int:
    from trunkline.engine.machine.hardware import choose_device
    from trunkline.engine.plan import make_plan, planned_batches, render_plan, total_steps
    from trunkline.engine.readiness import ready

    world_size = launched_world_size() if arguments.world_size is None else arguments.world_size
    if world_size < 1:
        raise ConfigError(f"--world-size {world_size}: give the number of ranks to plan for, 1 or more")
    task = make_task(config)
    backend = "fsdp" if arguments.backend == "fsdp" else "deepspeed"
    batches = planned_batches(task, config, world_size)
    config = config.in_steps(batches.per_epoch)
    config = ready(config, backend, total_steps(config, batches), world_size, choose_device(None))
    plan = make_plan(task, config, world_size, task.build_model())
    print(json.dumps(plan, indent=2) if arguments.plan == "json" else render_plan(plan))
    return 0


if __name__ == "__main__":
    status = main()
    stop()
    sys.exit(status)
