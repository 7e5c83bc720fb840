"""--batch_size and --grad_acc, which are per GPU: what a step is made of on any number of them.

    images_per_gpu(config, 256, world_size)    the micro-batch, the global batch, and BatchNorm's group
    accumulation(config, 0, world_size)        micro-batches a step, and the global batch

Both are functions of a flag (trunkline.engine.config.flags). This module imports nothing that takes long.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from trunkline.engine.config.draft import value_at
from trunkline.engine.errors import ConfigError
from trunkline.engine.machine.reading import read_object
from trunkline.models.image_classification.architectures import ARCHITECTURES, BATCH_NORMALIZED

MICRO, STEPS = "deepspeed.train_micro_batch_size_per_gpu", "deepspeed.gradient_accumulation_steps"
_MOST_NORMALISED = 32

Config = dict[str, Any]


def images_per_gpu(config: Config, value: int, world_size: int) -> Config:
    """Groups are of the largest divisor up to 32; small ones are refused where large ones are possible."""
    if value < 1:
        raise ConfigError(f"--batch_size {value}: give the number of images per GPU, 1 or more")
    steps = value_at(config, STEPS)
    group = max(size for size in range(1, _MOST_NORMALISED + 1) if value % size == 0)
    grouped = _is_grouped(config)
    if grouped and group < 8 < _MOST_NORMALISED < value:
        raise ConfigError(
            f"--batch_size {value}: BatchNorm's statistics are of equal groups of at most {_MOST_NORMALISED} images, "
            f"which would have {group} here: use {(value + 8) // 16 * 16}, or another multiple of 8"
        )
    sizes = _sizes(value, steps if isinstance(steps, int) else _auto_accumulation(value, world_size), world_size)
    return {**sizes, "model.batch_norm_group": group} if grouped else sizes


def _is_grouped(config: Config) -> bool:
    """Whether the network has BatchNorms that are trained, as far as can be told."""
    if value_at(config, "model.normalization") not in (None, "batch"):
        return False
    known, folder = ARCHITECTURES.get(value_at(config, "model.arch")), value_at(config, "model.path")
    if known is not None:
        return known.series in BATCH_NORMALIZED
    if folder is None:
        return True
    with contextlib.suppress(OSError, ValueError):  # a damaged folder is named when it is opened
        kind = read_object(Path(folder) / "config.json", finite=False).get("model_type")
        return kind not in {each.model_type for each in ARCHITECTURES.values() if each.series not in BATCH_NORMALIZED}
    return True


def accumulation(config: Config, value: int, world_size: int) -> Config:
    """-1 is one micro-batch a step, 0 as many as make about 256 images."""
    if value < -1:
        raise ConfigError(f"--grad_acc {value}: give -1 for none, 0 for about 256 images a step, or a number")
    micro = value_at(config, MICRO)
    if not isinstance(micro, int):
        raise ConfigError("--grad_acc: needs --batch_size, the images per GPU")
    if value == 0:
        return {**_sizes(micro, _auto_accumulation(micro, world_size), world_size), STEPS: "auto"}
    return {**_sizes(micro, abs(value), world_size), STEPS: abs(value)}


def _auto_accumulation(micro: int, world_size: int) -> int:
    return max(1, 256 // (micro * world_size))


def _sizes(micro: int, steps: int, world_size: int) -> Config:
    return {MICRO: micro, "deepspeed.train_batch_size": micro * steps * world_size}
