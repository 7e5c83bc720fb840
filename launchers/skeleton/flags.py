"""This workload's flags of `trunkline train`, `evaluate` and `predict`. Import nothing here that takes long."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from trunkline.engine.config.flags import Flag

DEFAULTS = Path(__file__).with_name("demo.json")
"""What is trained without --config."""

FLAGS = (Flag("width", "of the hidden layer", int, "model.width"),)


def evaluate(parser: ArgumentParser) -> None:
    """Those of `trunkline evaluate`."""
    parser.add_argument("--split", choices=["train", "val", "test"], default="test", help="default test")


def predict(parser: ArgumentParser) -> None:
    """Those of `trunkline predict`."""
    parser.add_argument("--x", type=float, nargs="+", required=True, help="numbers to predict for")
