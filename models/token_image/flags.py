"""The flags of this workload, and what it trains without a configuration file: light, so that --help is quick."""

from __future__ import annotations

import argparse

from trunkline.models.text.preparation_flags import add_source, add_splits, add_tokenizer
from trunkline.models.token_image.jit_flags import DEFAULTS, FLAGS
from trunkline.models.token_image.records import KINDS

__all__ = ["DEFAULTS", "FLAGS", "prepare"]


def prepare(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/prepare.py token_image`."""
    formats = ".json, .jsonl, .parquet, .csv, .tsv, .txt with a text a line"
    add_source(parser, "topics", "write Python's own documentation as files of records", formats, KINDS)
    add_tokenizer(parser, {"--byte-tokenizer": "256 tokens: a byte is a token"})
    parser.add_argument(
        "--use-chat-template", action="store_true",
        help="write prompt and answer as the chat template of --tokenizer does, not with a line break between them",
    )  # fmt: skip
    add_splits(parser)


def evaluate(parser: argparse.ArgumentParser) -> None:
    """This workload's own flags of `launchers/evaluate.py`."""
    parser.add_argument("--split", default="val", choices=("train", "val", "test"))
    parser.add_argument("--max-samples", type=int, default=96, help="evenly spaced images that are read (96)")
    parser.add_argument("--levels", type=int, default=16, help="levels of noise at which each is read (16)")
    parser.add_argument("--samples", type=int, default=16, help="texts that are made up; 0 for none (16)")
    parser.add_argument("--steps", type=int, default=25, help="steps of sampling them, by Heun's method (25)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the samples; default 0")
