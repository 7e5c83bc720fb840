"""The flags of this workload, and what it trains without a configuration file: light, so that --help is quick."""

from __future__ import annotations

import argparse
from pathlib import Path

from trunkline.engine.config.flags import seed
from trunkline.models.seq2seq.chat_flags import DEFAULTS, FLAGS
from trunkline.models.seq2seq.records import FIELDS, KINDS
from trunkline.models.text.preparation_flags import add_source, add_splits, add_tokenizer

__all__ = ["DEFAULTS", "FLAGS", "evaluate", "predict", "prepare"]


def prepare(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/prepare.py seq2seq`."""
    formats = ".parquet, .jsonl, .json, .csv, .tsv; of texts also .txt"
    add_source(parser, "numbers", "write an example's files of records; needs num2words", formats, KINDS)
    parser.add_argument("--fields", nargs=2, default=FIELDS, metavar=("PROMPT", "RESPONSE"), help="their names")
    add_tokenizer(parser)
    parser.add_argument("--max-token-length", type=int, metavar="N", help="characters of a token of the one trained")
    add_splits(parser)


def evaluate(parser: argparse.ArgumentParser) -> None:
    """This workload's own flags of `launchers/evaluate.py`."""
    parser.add_argument("--split", default="val", choices=("train", "val", "test"))
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--max-samples", type=int, help="evaluate this number of evenly spaced samples")
    some.add_argument("--generate", type=int, metavar="N", help="generate texts for N samples alone, 0 for none")
    parser.add_argument("--batch-size", type=int, default=16)


def predict(parser: argparse.ArgumentParser) -> None:
    """This workload's own flags of `launchers/predict.py`."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the text to answer")
    source.add_argument(
        "--prompts", metavar="FILE",
        help="a prompt on every line, or .jsonl, .json, .parquet, .csv, .tsv with `prompt`; - for standard input",
    )  # fmt: skip
    source.add_argument("--chat", action="store_true", help="talk: a line a turn, an empty line ends it")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write prompts and answers here, as JSON lines")
    parser.add_argument("--batch-size", type=int, help="with --prompts: prompts at once (16)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=320, metavar="N", help="tokens of an answer at most (320)"
    )
    parser.add_argument("--num-beams", type=int, metavar="N", help="beam search, such as 5; greedy unless given")
    parser.add_argument("--no-repeat-ngram-size", type=int, metavar="N", help="write no N tokens twice, such as 4")
    parser.add_argument("--sample", action="store_true", help="draw tokens, in place of the likeliest")
    parser.add_argument("--temperature", type=float, help="with --sample (0.98)")
    parser.add_argument("--top-k", type=int, metavar="K", help="with --sample: from the K likeliest (50)")
    parser.add_argument("--top-p", type=float, metavar="P", help="with --sample: the likeliest that add up to P (0.8)")
    parser.add_argument("--seed", type=seed, help="with --sample (0)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
