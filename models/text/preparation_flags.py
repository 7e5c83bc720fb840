"""The flags of `launchers/prepare.py` that workloads of text share: light, so that --help is quick."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DEFAULT_VOCAB_SIZE = 10_000
DEFAULT_VAL_FRACTION = 0.05


def add_source(parser: argparse.ArgumentParser, example: str, about: str, formats: str, kinds: Sequence[str]) -> None:
    """What is read, and where it goes. example: the one that can be written; about: what it is."""
    work = parser.add_mutually_exclusive_group(required=True)
    work.add_argument("--example", choices=[example], help=about)
    work.add_argument("--source", type=Path, nargs="+", metavar="PATH", help=f"files ({formats}) or folders of them")
    parser.add_argument("--kind", choices=kinds, default=kinds[0], help="what the records are")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")


def add_tokenizer(parser: argparse.ArgumentParser) -> Any:
    """Which tokenizer. The group that excludes all but one."""
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="a Hugging Face tokenizer, or STORE/tokenizer of another store"
    )
    tokenizer.add_argument("--train-tokenizer", action="store_true", help="train one on the training records")
    parser.add_argument("--vocab-size", type=int, metavar="N", help=f"of the one trained ({DEFAULT_VOCAB_SIZE})")
    return tokenizer


def add_splits(parser: argparse.ArgumentParser) -> None:
    """What is held out, and how much may be bad."""
    val = parser.add_mutually_exclusive_group()
    val.add_argument("--val-source", type=Path, nargs="+", metavar="PATH", help="validation records of their own")
    val.add_argument(
        "--val-fraction", type=float, metavar="F", help=f"share of the records for it ({DEFAULT_VAL_FRACTION})"
    )
    parser.add_argument("--test-source", type=Path, nargs="+", metavar="PATH", help="test records")
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.1, metavar="F", help="more bad records than that are an error (0.1)"
    )
