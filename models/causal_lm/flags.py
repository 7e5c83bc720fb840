"""The flags of this workload, and what it trains without a configuration file: light, so that --help is quick."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trunkline.engine.config.flags import Flag, seed
from trunkline.models.causal_lm.records import KINDS


def _precision(config: dict[str, Any], value: str, world_size: int) -> dict[str, Any]:
    from trunkline.engine.machine.hardware import choose_device, has_bf16_units  # which imports PyTorch

    enabled = value == "bf16" or (value == "auto" and has_bf16_units(choose_device(None)))
    return {"deepspeed.bf16.enabled": enabled}


_CONFIGS = Path(__file__).parents[2] / "configs/causal_lm"
FLAGS = (
    Flag("store", "folder that launchers/prepare.py wrote", str, "data.store"),
    Flag("model-path", "folder of the model that training starts from; without --config it is fine-tuned on answers",
         str, lambda config, value, world_size: {"model.path": value, "model.preset": None},
         defaults=_CONFIGS / "fine-tune.json"),
    Flag("objective", "what is trained", str,
         lambda config, value, world_size: {"model.objective": {"type": value}}, choices=("pretrain", "sft", "dpo")),
    Flag("precision", "what is computed in; auto: bf16 on a device that has units for it, else fp32", str, _precision,
         default="auto", choices=("auto", "bf16", "fp32")),
)  # fmt: skip
DEFAULTS = _CONFIGS / "tiny.json"
DEFAULT_VOCAB_SIZE = 10_000
DEFAULT_VAL_FRACTION = 0.05


def prepare(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/prepare.py causal_lm`."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--source",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="files (.jsonl, .json, .parquet, .txt) or folders of them",
    )
    source.add_argument("--example", action="store_true", help="a small English data set, written beside --out first")
    parser.add_argument("--kind", choices=KINDS, required=True, help="what the records are")
    parser.add_argument("--out", type=Path, required=True, metavar="STORE", help="the folder to write")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument(
        "--tokenizer", type=Path, metavar="FOLDER", help="a Hugging Face tokenizer, or STORE/tokenizer of another store"
    )
    tokenizer.add_argument("--train-tokenizer", action="store_true", help="train one on the training records")
    parser.add_argument("--vocab-size", type=int, metavar="N", help=f"of the one trained ({DEFAULT_VOCAB_SIZE})")
    parser.add_argument("--chat-template", type=Path, metavar="FILE", help="a Jinja template in place of its own")
    val = parser.add_mutually_exclusive_group()
    val.add_argument(
        "--val-fraction",
        type=float,
        metavar="F",
        help=f"share of the records for validation ({DEFAULT_VAL_FRACTION})",
    )
    val.add_argument("--val-source", type=Path, nargs="+", metavar="PATH", help="validation records of their own")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that tokenize (default: one for each core)")
    parser.add_argument(
        "--max-bad-fraction", type=float, default=0.1, metavar="F", help="more bad records than that are an error (0.1)"
    )


def evaluate(parser: argparse.ArgumentParser) -> None:
    """This workload's own flags of `launchers/evaluate.py`."""
    parser.add_argument("--split", default="val", choices=("train", "val"))
    parser.add_argument("--max-samples", type=int, help="evaluate this number of evenly spaced samples")
    parser.add_argument("--batch-size", type=int, default=16)


def predict(parser: argparse.ArgumentParser) -> None:
    """This workload's own flags of `launchers/predict.py`."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="the text to continue or to answer")
    source.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with a prompt on every line")
    parser.add_argument("--chat", action="store_true", help="prompts are what a user says; without any, talk")
    parser.add_argument("--system", help="with --chat: the system message")
    parser.add_argument("--max-new-tokens", type=int, help="default 128, or what the model has positions for")
    parser.add_argument("--temperature", type=float, help="sample at this temperature; greedy unless given")
    parser.add_argument("--top-k", type=int, help="with --temperature: sample from the K likeliest tokens")
    parser.add_argument("--top-p", type=float, help="with --temperature: from the likeliest that add up to P")
    parser.add_argument("--seed", type=seed, help="with --temperature: of sampling; default 0")
    parser.add_argument("--out", type=Path, metavar="FILE", help="with --prompt or --prompts: write JSON lines here")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default float32"
    )
