"""The flags of ChatLM's command line, under their own names; each in the place where it acts.

    trunkline train seq2seq --store chat --is_finetune=True --finetune_from model.bin --epochs=5 --learn_rate=1e-5

This module imports nothing that takes long.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trunkline.engine.config.draft import value_at
from trunkline.engine.config.flags import LENGTH, Flag
from trunkline.engine.errors import ConfigError

OPTIMIZER, SCHEDULE = "deepspeed.optimizer", "deepspeed.scheduler.params"
RATE, RULES = f"{OPTIMIZER}.params.lr", "training.parameters"
FROZEN = {"names": ["lm.shared.*", "lm.encoder.*"], "frozen": True}
"""The rule of --is_finetune: the decoder alone is trained."""
BY_DEVICE = "by device"
_ADVISED = 1e-5
_WIDTHS = (
    "preset", "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads",
    "feed_forward_proj", "relative_attention_num_buckets", "relative_attention_max_distance",
)  # fmt: skip

Config = dict[str, Any]


def learn_rate(config: Config, value: float, world_size: int) -> Config:
    """The optimizer's; of OneCycleLR, which ignores that, the start's. What rates a schedule names keep their ratio."""
    if not value > 0:
        raise ConfigError(f"--learn_rate {value:g}: trains nothing: give a rate above 0")
    before, params = value_at(config, RATE), value_at(config, SCHEDULE) or {}
    named = [key for key in params if key.endswith("_lr") or key == "eta_min"]
    if others := [key for key in named if not isinstance(params[key], float | int)]:
        raise ConfigError(f"--learn_rate {value:g}: {SCHEDULE}.{others[0]} is no number to change with it: use --set")
    if (start := _start(config)) is not None:
        before = start
    if named and not before:
        raise ConfigError(f"--learn_rate {value:g}: {RATE} is not set, so {named[0]} has no ratio to it: set both")
    return {RATE: value} | {f"{SCHEDULE}.{key}": params[key] * (value / before) for key in named}


def _start(config: Config) -> float | None:
    """The rate that OneCycleLR starts at; None for other schedules."""
    params = value_at(config, SCHEDULE) or {}
    highest, ratio = params.get("max_lr"), params.get("div_factor", 25)
    one_cycle = value_at(config, "deepspeed.scheduler.type") == "OneCycleLR"
    numbers = isinstance(highest, float | int) and isinstance(ratio, float | int) and ratio > 0
    return highest / ratio if one_cycle and numbers else None


def finetune_from(config: Config, value: str, world_size: int) -> Config:
    """A folder is a whole model; a file holds the weights of the one that is configured."""
    if Path(value).suffix in (".bin", ".pt", ".pth", ".safetensors") and not Path(value).is_dir():
        return {"model.weights": value, "model.path": None}
    if (Path(value) / "checkpoints").is_dir():
        raise ConfigError(
            f"--finetune_from {value}: a run's folder: give its best weights, {value}/best, or {value}/final"
        )
    if Path(value).is_dir() and not (Path(value) / "config.json").is_file():
        raise ConfigError(
            f"--finetune_from {value}: holds no config.json: give the folder of a Hugging Face model, such as "
            "RUN/final; launchers/export.py makes one of a checkpoint"
        )
    given = [key for key in (*_WIDTHS, "weights") if value_at(config, f"model.{key}") is not None]
    return {f"model.{key}": None for key in given} | {"model.path": value}


def untie_head(config: Config, value: bool, world_size: int) -> Config:
    return {"model.tie_word_embeddings": False if value else None}


def is_finetune(config: Config, value: bool, world_size: int) -> Config:
    rules = value_at(config, RULES) or []
    others = [rule for rule in rules if rule != FROZEN]
    asked = [FROZEN, *others] if value else others
    return {} if asked == rules else {RULES: asked}


def check_finetune(config: Config, value: bool) -> list[str]:
    """What is frozen, and whether the rate is high for it. Raises ConfigError where there is nothing to begin with."""
    if not value:
        return []
    if value_at(config, "model.path") is None and value_at(config, "model.weights") is None:
        raise ConfigError(
            "--is_finetune: needs the model to begin with: give --finetune_from FOLDER, or --finetune_from FILE.bin "
            "for the weights of the preset"
        )
    frozen = "--is_finetune: the shared embedding and the encoder are frozen"
    if value_at(config, "model.tie_word_embeddings") is not False:
        frozen += ", and with the embedding a head if it is tied to it: --untie_head trains one of its own"
    start, highest = _start(config), value_at(config, f"{SCHEDULE}.max_lr")
    rate = value_at(config, RATE) if start is None else start
    if not isinstance(rate, float | int) or rate <= _ADVISED * (1 + 1e-9):
        return [frozen]
    high = f"--is_finetune: the learning rate is {rate:g}"
    high += "" if start is None else f", which rises to {highest:g}"
    high += f"; at most {_ADVISED:g} is advised, for 3 to 5 epochs"
    if str(value_at(config, f"{OPTIMIZER}.type")).lower() == "adamwscale":
        high += " (of AdamW: that of AdamWScale is relative to each parameter's root mean square)"
    return [frozen, high]


def is_keep_training(config: Config, value: bool, world_size: int) -> Config:
    return {"--resume": True if value else "none"}


def bf16(config: Config, value: bool | str, world_size: int) -> Config:
    if value == BY_DEVICE:
        import torch  # which is there by now

        value = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return {"deepspeed.bf16.enabled": value}


FLAGS = (
    Flag("store", "folder that launchers/prepare.py wrote", str, "data.store", required=("data.store",)),
    LENGTH[0],
    Flag("learn_rate", "the optimizer's rate; with OneCycleLR that of the start", float, learn_rate),
    Flag("finetune_from", "model to begin with: a Hugging Face folder, or a .bin file of weights", str, finetune_from),
    Flag("untie_head", "give the head weights of its own, which are trained", bool, untie_head),
    Flag("is_finetune", "freeze the shared embedding and the encoder, train the decoder", bool, is_finetune,
         defaults=Path(__file__).with_name("finetune.json"), check=check_finetune),
    Flag("is_keep_training", "continue what the run's folder holds; --epochs counts all, done ones too", bool,
         is_keep_training),
    Flag("bf16", "train in bf16, which is the default on a GPU that has it", bool, bf16, default=BY_DEVICE),
)  # fmt: skip
DEFAULTS = Path(__file__).with_name("default.json")
