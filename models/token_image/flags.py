"""The flags of this workload: light, so that --help is quick."""

from __future__ import annotations

import argparse


def evaluate(parser: argparse.ArgumentParser) -> None:
    """This workload's own flags of `launchers/evaluate.py`."""
    parser.add_argument("--split", default="val", choices=("train", "val", "test"))
    parser.add_argument("--max-samples", type=int, default=96, help="evenly spaced images that are read (96)")
    parser.add_argument("--levels", type=int, default=16, help="levels of noise at which each is read (16)")
    parser.add_argument("--samples", type=int, default=16, help="texts that are made up; 0 for none (16)")
    parser.add_argument("--steps", type=int, default=25, help="steps of sampling them, by Heun's method (25)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the samples; default 0")
