"""Export whole weights from a run's checkpoint: `python launchers/export.py --run runs/fluid-demo --out weights`.

The result is a folder like the run's best/: config.json, the workload's files, and the weights as safetensors.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from trunkline.engine.config.flags import Parser
from trunkline.engine.errors import CheckpointError, ConfigError
from trunkline.launchers.entry import begin, status_of
from trunkline.models.registry import config_sections, make_task, onnx_writer, weights_task

DTYPES = ("float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> int:
    """Find the checkpoint, write its weights, say where. Returns the exit status: 0 done, 2 a user's error."""
    return status_of(lambda: _export(_parser().parse_args(argv)))


def _parser() -> Parser:
    parser = Parser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    parser.add_argument("--out", type=Path, required=True, help="a new or empty folder for the weights")
    parser.add_argument("--step", type=int, help="the checkpoint of this step; default the newest good one")
    parser.add_argument("--dtype", choices=DTYPES, help="of the parameters, buffers keep theirs; default fp32")
    parser.add_argument("--average", action="store_true", help="the weights' moving average (training.ema) instead")
    parser.add_argument("--onnx", action="store_true", help="also model.onnx, checked by onnxruntime; extra: onnx")
    parser.add_argument("--max-shard-gib", type=float, default=2.0, help="largest file, in GiB (default 2)")
    return parser


def _export(arguments: argparse.Namespace) -> None:
    import torch

    from trunkline.engine.checkpoint.assets import copy_assets, has_assets
    from trunkline.engine.checkpoint.checkpoints import Checkpoints
    from trunkline.engine.checkpoint.digests import DRAFT, replace_files
    from trunkline.engine.checkpoint.export import export_weights
    from trunkline.engine.checkpoint.weights import write_assets
    from trunkline.engine.config.run_config import load_config
    from trunkline.engine.ranks.distributed import Ranks

    out = arguments.out
    if out.exists() and (not out.is_dir() or any(path.name != DRAFT for path in out.iterdir())):
        raise ConfigError(f"--out {out}: is not an empty folder; choose another")
    if not 0 < arguments.max_shard_gib < math.inf:
        raise ConfigError(f"--max-shard-gib {arguments.max_shard_gib}: give a size above 0, such as 2")
    checkpoints = Checkpoints(arguments.run / "checkpoints", Ranks(0, 1, 0, torch.device("cpu")), keep_last=1)
    if arguments.step is not None:
        found = checkpoints.load(checkpoints.folder / f"step-{arguments.step:08d}")
    else:
        newest = checkpoints.newest()
        if newest is None:
            raise CheckpointError(f"{arguments.run}: holds no checkpoint: give the folder of a run that has saved one")
        found = newest
    config = load_config(arguments.run / "config.json", sections=config_sections)
    if arguments.average and config.training.ema is None:
        raise ConfigError(f"--average: {arguments.run} keeps no average of its weights (training.ema): leave it out")
    write_onnx = onnx_writer(config.workload) if arguments.onnx else None
    kept = has_assets(arguments.run)  # runs of earlier versions need their data for what stands beside the weights
    task = weights_task(config) if kept else make_task(config)
    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    shard_bytes = int(arguments.max_shard_gib * 2**30)
    size = 0

    def write(draft: Path) -> None:
        nonlocal size
        files = export_weights(
            found, draft, shard_bytes, dtype, task.tensor_name, task.file_tensors, average=arguments.average
        )
        size = sum(file.stat().st_size for file in files)
        if kept:
            copy_assets(arguments.run, draft, arguments.dtype or "float32")
        else:
            write_assets(draft, task, config, arguments.dtype or "float32")
        if write_onnx is not None:
            write_onnx(draft)

    replace_files(arguments.out, write)
    print(f"exported step {found.state['step']}: {size / 2**20:.1f} MiB in {arguments.out}, read back and compared")


if __name__ == "__main__":
    begin()
    sys.exit(main())
