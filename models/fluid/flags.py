"""The flags of this workload, and what it trains without a configuration file: light, so that --help is quick."""

from __future__ import annotations

import argparse
from pathlib import Path

from trunkline.engine.config.flags import Flag, seed
from trunkline.models.fluid.schema import MINUTES

FLAGS = (Flag("store", "folder that launchers/prepare.py wrote", str, "data.store"),)
DEFAULTS = Path(__file__).parents[2] / "configs/fluid/tiny.json"
HORIZONS = {"1 minute": 1, "60 minutes": 60, "6 hours": 360, "whole day": None}
"""How far from its start a rollout is judged, in minutes; None: to the end of the day."""

BASELINES = ("persistence", "ridge", "switches", "mlp", "graph")
"""What a surrogate is compared with."""


def prepare(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/prepare.py fluid`."""
    work = parser.add_mutually_exclusive_group(required=True)
    work.add_argument("--source", type=Path, metavar="ROOT", help="CSV cases: ROOT/{train,test}/<case>/*.csv")
    work.add_argument(
        "--simulate", choices=["demo", "regional", "reference"], help="write CSV cases of a simulated network"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--seed", type=seed, default=42, help="chooses the validation cases, or the simulated days")
    parser.add_argument("--workers", type=int, metavar="N", help="cases read at a time (default: one for each core)")
    source = parser.add_argument_group("with --source")
    source.add_argument("--val-fraction", type=float, default=0.1, help="share of train/ that becomes val (0.1)")
    source.add_argument("--skip-bad-cases", action="store_true", help="leave out cases with errors and list them")
    simulated = parser.add_argument_group("with --simulate")
    simulated.add_argument("--cases", type=int, default=0, metavar="N", help="training cases to write")
    simulated.add_argument("--test-cases", type=int, default=0, metavar="K", help="test cases to write")
    simulated.add_argument("--boundary-only-tests", action="store_true", help="test cases without their outputs")


def evaluate(parser: argparse.ArgumentParser) -> None:
    """This workload's own flags of `launchers/evaluate.py`."""
    parser.add_argument("--split", default="test", choices=("train", "val", "test"))
    parser.add_argument("--max-cases", type=int, help="evaluate on the first N cases only")
    parser.add_argument("--horizons", nargs="+", choices=tuple(HORIZONS), default=list(HORIZONS))
    parser.add_argument("--batch-size", type=int, default=256, help="windows rolled out together")
    parser.add_argument("--no-ridge", action="store_true", help="leave the ridges out (minutes for V = 6,712)")
    parser.add_argument(
        "--baselines",
        nargs="+",
        choices=BASELINES,
        help="what to compare with: persistence ridge switches, and what is kept with the store, unless given",
    )
    parser.add_argument(
        "--baseline-minutes",
        type=_positive,
        metavar="M",
        help="how long mlp and graph train, each (default: as long as those kept, or else 1)",
    )


def predict(parser: argparse.ArgumentParser) -> None:
    """This workload's own flags of `launchers/predict.py`."""
    parser.add_argument("--case", type=Path, required=True, help="folder with Boundary.csv, and outputs where known")
    parser.add_argument("--out", type=Path, required=True, help="folder for the CSV files and the pictures")
    parser.add_argument("--start", type=Path, help="folder of a case whose last minutes are the start")
    parser.add_argument("--start-minute", type=int, default=MINUTES, help="with --start: its minute, 1440 unless given")
    parser.add_argument(
        "--variables", nargs="+", metavar="NAME", help="what to plot; the most moving ones unless given"
    )
    parser.add_argument("--store", type=Path, help="prepared data set to look for a start in; the run's unless given")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: use a number above 0, such as 1 or 0.5")
    return value
