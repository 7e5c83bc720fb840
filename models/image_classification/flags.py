"""The flags of this workload: light, so that --help is quick."""

from __future__ import annotations

import argparse
from pathlib import Path

from trunkline.models.image_classification.fastai_flags import DEFAULTS, FLAGS

__all__ = ["DEFAULTS", "FLAGS"]


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
