"""The flags of the JiT trainer's command line, under their own names; each in the place where it acts.

    trunkline train token_image --data_path store --model JiT-B/4 --batch_size 4 --epochs 100 --lr 1e-4

`--resume`, which also takes that trainer's checkpoint_epoch_N.pth, and `--output_dir` are launchers/train.py's own.
This module imports nothing that takes long.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from trunkline.engine.config.draft import value_at
from trunkline.engine.config.flag_meanings import BY_DEVICE, decay_of_all, mixed_precision, note_of_precision
from trunkline.engine.config.flags import LENGTH, Flag, one_of
from trunkline.engine.errors import ConfigError

MODELS = ("JiT-B/4", "JiT-B/16", "JiT-B/32", "JiT-L/16", "JiT-L/32", "JiT-H/16", "JiT-H/32")
_WIDTHS = ("patch", "d_model", "num_layers", "num_heads")
MICRO, STEPS, GLOBAL = (
    f"deepspeed.{name}"
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
)
OPTIMIZER, SCHEDULE = "deepspeed.optimizer.params", "deepspeed.scheduler.params"
TRACKERS = "training.trackers"

Config = dict[str, Any]


def prepare_command(source: str, tokenizer: str | None, chat_template: bool | None) -> str:
    """What makes a store of texts, in the folder `store_of(source)`."""
    words = ["python", "launchers/prepare.py", "token_image", "--source", source, "--out", str(store_of(source))]
    if chat_template:
        return shlex.join([*words, "--tokenizer", tokenizer or "FOLDER", "--use-chat-template"])
    return shlex.join([*words, *(["--tokenizer", tokenizer] if tokenizer else ["--train-tokenizer"])])


def store_of(source: str) -> Path:
    """Beside the texts."""
    path = Path(source)
    if path.name in ("", ".."):
        path = path.resolve()
    return path.with_name(f"{path.name if path.is_dir() else path.stem}-store")


def data_path(config: Config, value: str, world_size: int) -> Config:
    """A prepared store. Texts are not prepared here: a run on many ranks would wait for one of them, for hours."""
    if Path(value).exists() and not (Path(value) / "store.json").is_file():
        asked = value_at(config, "data.tokenizer"), value_at(config, "data.chat_template")
        raise ConfigError(
            f"--data_path {value}: holds texts, and a run reads a prepared store: "
            f"run `{prepare_command(value, *asked)}`, and then train with --data_path {store_of(value)}"
        )
    return {"data.store": value}


def model_name(text: str) -> str:
    """With or without JiT-, in any case. Raises argparse.ArgumentTypeError."""
    return one_of(MODELS)(text if text.lower().startswith("jit") else f"JiT-{text}")


def network(config: Config, value: str, world_size: int) -> Config:
    """The preset, in place of any widths."""
    given = [key for key in _WIDTHS if value_at(config, f"model.{key}") is not None]
    return {f"model.{key}": None for key in given} | {"model.preset": value.removeprefix("JiT-")}


def batch_size(config: Config, value: int, world_size: int) -> Config:
    """Images per GPU and micro-batch; what is accumulated stays."""
    return _sizes(value, _accumulation(config, world_size), world_size)


def accumulation(config: Config, value: int, world_size: int) -> Config:
    micro = value_at(config, MICRO)
    if not isinstance(micro, int):
        raise ConfigError("--gradient_accumulation_steps: needs --batch_size, the images per GPU")
    return _sizes(micro, value, world_size)


def _accumulation(config: Config, world_size: int) -> int:
    steps, whole, micro = (value_at(config, key) for key in (STEPS, GLOBAL, MICRO))
    if isinstance(steps, int):
        return steps
    return max(1, whole // (micro * world_size)) if isinstance(whole, int) and isinstance(micro, int) else 1


def _sizes(micro: int, steps: int, world_size: int) -> Config:
    """The global batch, of which other numbers of ranks derive their accumulation."""
    return {MICRO: micro, STEPS: "auto", GLOBAL: micro * steps * world_size}


def warmup(config: Config, value: float, world_size: int) -> Config:
    return {f"{SCHEDULE}.warmup": {"epochs": value} if value else 0}


def save_interval(config: Config, value: float, world_size: int) -> Config:
    return {"training.save_every": {"epochs": value}}


def wandb(config: Config, value: bool, world_size: int) -> Config:
    others = [name for name in value_at(config, TRACKERS) or ["tensorboard"] if name != "wandb"]
    return {TRACKERS: [*others, *["wandb"] * value]}


def positive(text: str) -> int:
    """An integer from 1 on. Raises argparse.ArgumentTypeError."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, found {text!r}")
    return int(text)


FLAGS = (
    Flag("tokenizer_path", "the tokenizer, a folder, that the data was prepared with", str, "data.tokenizer"),
    Flag("use_chat_template", "the data was prepared with its chat template", bool, "data.chat_template"),
    Flag("data_path", "the prepared data, a folder", str, data_path, required=("data.store",)),
    Flag("img_size", "edge of an image in pixels, a token each", int, "data.img_size", default=64),
    Flag("max_tokens", "tokens of an image at most; all its pixels unless given", int, "data.max_tokens"),
    Flag("model", f"one of {', '.join(MODELS)}", model_name, network, default="JiT-B/4"),
    Flag("batch_size", "images per GPU", positive, batch_size, default=4),
    Flag("gradient_accumulation_steps", "micro-batches a step", positive, accumulation, default=1),
    replace(LENGTH[0], default=100),
    Flag("use_amp", "mixed precision, which is on by default on a GPU", bool, mixed_precision, default=BY_DEVICE,
         check=note_of_precision),
    Flag("lr", "the rate after the warm-up", float, f"{OPTIMIZER}.lr", default=1e-4),
    Flag("weight_decay", "weight decay, of norms and biases too", float, decay_of_all, default=0.01),
    Flag("warmup_epochs", "epochs in which the rate rises from 0", float, warmup, default=5),
    Flag("max_grad_norm", "gradients are clipped at this norm; 0: never", float, "deepspeed.gradient_clipping",
         default=1.0),
    Flag("save_interval", "epochs between checkpoints", float, save_interval, default=10),
    Flag("log_interval", "steps between lines of the log", int, "training.log_every", default=10),
    Flag("use_wandb", "show the run in Weights & Biases too", bool, wandb),
)  # fmt: skip
DEFAULTS = Path(__file__).with_name("default.json")
