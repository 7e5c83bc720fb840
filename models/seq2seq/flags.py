"""The flags of this workload, and what it trains without a configuration file: light, so that --help is quick."""

from __future__ import annotations

import argparse
from pathlib import Path

from trunkline.engine.config.flags import Flag
from trunkline.models.seq2seq.records import FIELDS, KINDS

FLAGS = (Flag("store", "folder that launchers/prepare.py wrote", str, "data.store", required=("data.store",)),)
DEFAULTS = Path(__file__).with_name("default.json")
DEFAULT_VOCAB_SIZE = 10_000
DEFAULT_VAL_FRACTION = 0.05


def prepare(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/prepare.py seq2seq`."""
    work = parser.add_mutually_exclusive_group(required=True)
    work.add_argument("--example", choices=["numbers"], help="write an example's files of records; needs num2words")
    work.add_argument(
        "--source", type=Path, nargs="+", metavar="PATH",
        help="files (.parquet, .jsonl, .json, .csv, .tsv; of texts also .txt) or folders of them",
    )  # fmt: skip
    parser.add_argument("--kind", choices=KINDS, default="pairs", help="what the records are")
    parser.add_argument("--fields", nargs=2, default=FIELDS, metavar=("PROMPT", "RESPONSE"), help="their names")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="a Hugging Face tokenizer, or STORE/tokenizer of another store"
    )
    tokenizer.add_argument("--train-tokenizer", action="store_true", help="train one on the training records")
    parser.add_argument("--vocab-size", type=int, metavar="N", help=f"of the one trained ({DEFAULT_VOCAB_SIZE})")
    parser.add_argument("--max-token-length", type=int, metavar="N", help="characters of a token of the one trained")
    parser.add_argument("--val-source", type=Path, nargs="+", metavar="PATH", help="validation records of their own")
    parser.add_argument("--test-source", type=Path, nargs="+", metavar="PATH", help="test records")
    parser.add_argument(
        "--val-fraction", type=float, metavar="F",
        help=f"share of the records for validation ({DEFAULT_VAL_FRACTION}) where there is no --val-source",
    )  # fmt: skip
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.1, metavar="F", help="more bad records than that are an error (0.1)"
    )


def evaluate(parser: argparse.ArgumentParser) -> None:
    """This workload's own flags of `launchers/evaluate.py`."""
    parser.add_argument("--split", default="val", choices=("train", "val", "test"))
    parser.add_argument("--max-samples", type=int, help="evaluate this number of evenly spaced samples")
    parser.add_argument("--batch-size", type=int, default=16)


def predict(parser: argparse.ArgumentParser) -> None:
    """This workload's own flags of `launchers/predict.py`."""
    parser.add_argument("--prompt", help="the text to answer")
