"""The flags of this workload, and what it trains without a configuration file: light, so that --help is quick."""

from __future__ import annotations

import argparse
from pathlib import Path

from trunkline.engine.config.flags import seed
from trunkline.models.text.preparation_flags import add_source, add_splits, add_tokenizer
from trunkline.models.token_image.jit_flags import DEFAULTS, FLAGS
from trunkline.models.token_image.records import KINDS

__all__ = ["DEFAULTS", "FLAGS", "evaluate", "predict", "prepare"]


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
    parser.add_argument(
        "--max-samples", type=int,
        help="evenly spaced images that are read; default as many as have 24,576 pixels (96 of 16 x 16), 4 at least",
    )  # fmt: skip
    parser.add_argument("--levels", type=int, default=16, help="levels of noise at which each is read (16)")
    parser.add_argument("--samples", type=int, default=16, help="texts that are made up; 0 for none (16)")
    parser.add_argument("--steps", type=int, default=25, help="steps of sampling them, by Heun's method (25)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=seed, default=0, help="of the samples; default 0")


def predict(parser: argparse.ArgumentParser) -> None:
    """This workload's own flags of `launchers/predict.py`."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", metavar="TEXT", help="continue this text; without it texts are made up")
    what.add_argument("--text", help="fill in the unknown tokens of this text, which --mask stands for")
    what.add_argument("--denoise", metavar="TEXT", help="put noise on this text and take it off in one step")
    parser.add_argument("--mask", metavar="CHARACTER", help="with --text: each stands for one unknown token (_)")
    parser.add_argument("--time", type=float, help="with --denoise: how noisy, from 0 to 1000 (500)")
    parser.add_argument("--condition", metavar="TEXT", help="what comes before the text, for a model of dialogues")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="different texts (1)")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of a text at most; all that fit unless given")
    parser.add_argument("--method", choices=("euler", "heun", "ancestral"), help="of sampling (heun)")
    parser.add_argument("--steps", type=int, help="of sampling, even in the network's time (50)")
    parser.add_argument("--seed", type=seed, default=0, help="of the noise; default 0")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write texts, images, masks and frames here")
