"""Export whole weights from a run's checkpoint: `python launchers/export.py --run runs/fluid-demo --out weights`.

The result is a folder like the run's best/: config.json, the workload's files, and the weights as safetensors.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from engine.output import keep_printing
    from engine.stopping import listen

    keep_printing()
    listen(exit_code=130, advice="run the same command again")

import argparse
import sys
from pathlib import Path

import torch

from engine.checkpoint import Checkpoints
from engine.config import load_config
from engine.distributed import Ranks
from engine.errors import CheckpointError, TrunklineError
from engine.export import DTYPES, export_weights
from engine.impostors import refuse_shadowed
from engine.weights import write_assets
from models.registry import config_sections, make_task

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def main(argv: list[str] | None = None) -> int:
    """Find the checkpoint, write its weights, say where. Returns the exit status: 0 done, 2 a user's error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder for the weights")
    parser.add_argument("--step", type=int, help="the checkpoint of this step; default the newest good one")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: as in the checkpoint, fp32 master weights")
    parser.add_argument("--max-shard-gib", type=float, default=2.0, help="largest file, in GiB (default 2)")
    try:
        return _export(parser.parse_args(argv))
    except (TrunklineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _export(arguments: argparse.Namespace) -> int:
    refuse_shadowed()
    checkpoints = Checkpoints(arguments.run / "checkpoints", ALONE, keep_last=1)
    if arguments.step is not None:
        found = checkpoints.load(checkpoints.folder / f"step-{arguments.step:08d}")
    else:
        newest = checkpoints.newest()
        if newest is None:
            raise CheckpointError(f"{arguments.run}: holds no checkpoint: give the folder of a run that has saved one")
        found = newest
    config = load_config(arguments.run / "config.json", sections=config_sections)
    task = make_task(config)
    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    files = export_weights(found, arguments.out, int(arguments.max_shard_gib * 2**30), dtype, task.weight_name)
    write_assets(arguments.out, task, config, arguments.dtype or "float32")
    size = sum(file.stat().st_size for file in files)
    print(f"exported step {found.state['step']}: {size / 2**20:.1f} MiB in {arguments.out}, read back and compared")
    return 0


if __name__ == "__main__":
    sys.exit(main())
