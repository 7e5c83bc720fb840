"""`python launchers/prepare.py image_classification ...`: a folder of images into a store, or an example as a folder.

run(arguments)
"""

from __future__ import annotations

import argparse

import numpy as np

from trunkline.engine.errors import ConfigError, DataError
from trunkline.models.image_classification.conversion import prepare
from trunkline.models.image_classification.decode import Size
from trunkline.models.image_classification.example import write_digits
from trunkline.models.image_classification.flags import DEFAULT_SIZE
from trunkline.models.image_classification.selection import class_notes

_OF_A_SOURCE = ("img_size", "short_side", "train_size", "val_size", "workers")


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line says. Raises ConfigError and DataError."""
    try:
        _write_example(arguments) if arguments.example else _prepare(arguments)
    except OSError as error:  # a full disk, a folder that must not be written
        raise DataError(f"{arguments.out}: {error}: mend that and run the same command again") from error


def _prepare(arguments: argparse.Namespace) -> None:
    square, short_side = arguments.img_size, arguments.short_side
    if square is None and short_side is None:
        square = DEFAULT_SIZE
    store, is_new = prepare(
        arguments.source,
        arguments.out,
        Size(square, short_side),
        train_size=arguments.train_size,
        val_size=arguments.val_size,
        size_per_class=arguments.size_per_class,
        workers=arguments.workers,
        max_bad_fraction=arguments.max_bad_fraction,
        progress=True,
    )
    if not is_new:
        print(f"{arguments.out}: already prepared from files of the same names and sizes; nothing to do")
        print("  if what is in one of them has changed, remove that folder first")
    counts = ", ".join(f"{len(store[f'{split}/labels']):,} {split}" for split in store.splits)
    shape = f"at most {short_side} pixels on the shorter side" if square is None else f"{square} x {square} pixels"
    print(f"{arguments.out}: {len(store.classes):,} classes, {counts} images of {shape}")
    labels = {split: (held := store[f"{split}/labels"]).rows(0, len(held)).astype(np.int64) for split in store.splits}
    for line in (*store.index["remarks"], *class_notes(store.classes, labels)):
        print(f"  {line}")


def _write_example(arguments: argparse.Namespace) -> None:
    if given := [name for name in _OF_A_SOURCE if getattr(arguments, name) is not None]:
        flag = f"--{given[0].replace('_', '-')}"
        raise ConfigError(f"{flag}: goes with --source; --example writes the images as they are")
    counts = write_digits(arguments.out)
    print(f"{arguments.out}: {', '.join(f'{count:,} {split}' for split, count in counts.items())} images of 10 digits")
