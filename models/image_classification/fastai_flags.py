"""The flags of the FastAI-compatible command line, under their own names; each in the place where it acts.

    trunkline train image_classification --data_path shots --arch resnet34 --batch_size 256 --epochs 100 --lr0 0.01

What a flag there meant and cannot mean here is an error that says what to use. docs/image_classification.md has the
table. This module imports nothing that takes long; that PyTorch is asked for GPUs costs nothing where a flag acts.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from trunkline.engine.config.draft import value_at
from trunkline.engine.config.flag_meanings import BY_DEVICE, decay_of_all, mixed_precision
from trunkline.engine.config.flags import LENGTH, Flag, one_of
from trunkline.engine.errors import ConfigError
from trunkline.models.image_classification.architectures import ARCHITECTURES, architectures
from trunkline.models.image_classification.per_gpu import MICRO, accumulation, images_per_gpu

OPTIMIZERS = ("SGD", "Adam", "AdamW", "RMSprop")
SHAPES = ("cosine", "cosine_restarts", "linear", "constant", "polynomial", "step")

OPTIMIZER, SCHEDULER = "deepspeed.optimizer", "deepspeed.scheduler"
RATE, DECAY = f"{OPTIMIZER}.params.lr", f"{OPTIMIZER}.params.weight_decay"
SHAPE, START_MOMENTUM = "WarmupShape", f"{SCHEDULER}.params.start_momentum"
WHERE_INSTALLED, HUNDREDTH = "where installed", "0.01 lr0"
"""Defaults that a user cannot type; what they come to is decided below, and shown by --plan."""

Config = dict[str, Any]


def list_models(config: Config, value: str, world_size: int) -> Config:
    """Print the networks of the series with their parameters, and end."""
    found = architectures(value.lower())
    if not found:
        series = ", ".join(dict.fromkeys(each.series for each in ARCHITECTURES.values()))
        raise ConfigError(f"--list-models {value}: no network is of that series: use one of {series}, or none")
    print("\n".join(f"{name:<20}{count:>12,} parameters at 1,000 classes" for name, count in found.items()))
    raise SystemExit(0)


def devices(config: Config, value: str, world_size: int) -> Config:
    """Show this process the GPUs that are named, before anything asks for them."""
    if value != "cpu" and not re.fullmatch(r"\d+(,\d+)*", value):
        raise ConfigError(f"--device {value}: expected numbers of GPUs such as 0,1,2,3, or cpu")
    # DeepSpeed's launcher says LOCAL_SIZE
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    named = value.split(",")
    count = len(set(named))
    if len(named) > count:
        raise ConfigError(f"--device {value}: names a GPU twice: name each once")
    if value != "cpu" and count > 1 and world_size == 1:
        raise ConfigError(f"--device {value}: this is one process, which uses one GPU: {_many(count)}")
    if value != "cpu" and count < ranks:
        raise ConfigError(f"--device {value}: names {count} GPUs for {ranks} processes: name one for each")
    if value != "cpu":
        import torch  # which is there by now

        there = torch.cuda.device_count()
        if missing := [name for name in named if int(name) >= there]:
            raise ConfigError(
                f"--device {value}: PyTorch sees {there} GPUs, so there is no {missing[0]}: name others, or use "
                "--device cpu"
            )
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if value == "cpu" else value
    return {}


def distributed(config: Config, value: bool, world_size: int) -> Config:
    if value and world_size == 1:
        raise ConfigError(f"--distributed: this is one process: {_many('N')}")
    return {}


def _many(count: int | str) -> str:
    return f"start `torchrun --nproc_per_node {count} launchers/train.py ...`, or `deepspeed --num_gpus {count} ...`"


def data_path(config: Config, value: str, world_size: int) -> Config:
    """A folder of images, or a prepared store, whichever it is."""
    is_store = (Path(value) / "store.json").is_file()
    return {"data.path": None if is_store else value, "data.store": value if is_store else None}


def architecture(text: str) -> str:
    """The name of a network, or a folder that exists. Raises argparse.ArgumentTypeError."""
    return text if Path(text).is_dir() else one_of(tuple(ARCHITECTURES))(text)


def network(config: Config, value: str, world_size: int) -> Config:
    is_name = value in ARCHITECTURES
    return {"model.arch": value if is_name else None, "model.path": None if is_name else value}


def pretrained(config: Config, value: str, world_size: int) -> Config:
    if not value:
        raise ConfigError(
            "--pretrained: weights are not downloaded: give the .pth or .safetensors file of torchvision's or timm's, "
            "--pretrained FILE"
        )
    return {"model.pretrained": value}


def shape(config: Config, value: str, world_size: int) -> Config:
    if value_at(config, f"{SCHEDULER}.type") == SHAPE:
        return {f"{SCHEDULER}.params.shape": value}
    params = {"shape": value, "warmup": {"epochs": 3}, "min_ratio": 0.1, "every": {"epochs": 1}}
    if "momentum" in (value_at(config, f"{OPTIMIZER}.params") or {}):
        params["start_momentum"] = 0.85
    return {SCHEDULER: {"type": SHAPE, "params": params}}


def optimizer(config: Config, value: str, world_size: int) -> Config:
    """SGD is Nesterov's; Adam is torch's, whose weight decay is part of the gradient."""
    own: dict[str, Config] = {
        "SGD": {"momentum": 0.9, "nesterov": True}, "RMSprop": {"momentum": 0.9}, "Adam": {"adam_w_mode": False}
    }  # fmt: skip
    kept = {key.rpartition(".")[2]: found for key in (RATE, DECAY) if (found := value_at(config, key)) is not None}
    if str(value_at(config, f"{OPTIMIZER}.type")).lower() == value.lower():
        kept = value_at(config, f"{OPTIMIZER}.params") or {}
    changes: Config = {OPTIMIZER: {"type": value, "params": {**kept, **own.get(value, {})}}}
    if value_at(config, f"{SCHEDULER}.type") == SHAPE:
        changes[START_MOMENTUM] = 0.85 if "momentum" in own.get(value, {}) else None
    return changes


def lowest_rate(config: Config, value: float | str, world_size: int) -> Config:
    if (kind := value_at(config, f"{SCHEDULER}.type")) != SHAPE:
        raise ConfigError(
            f"--min_lr {value}: is of the schedule {SHAPE}, not of {kind}: give --scheduler_type cosine too"
        )
    return {f"{SCHEDULER}.params.min_lr": 0.01 * value_at(config, RATE) if value == HUNDREDTH else value}


def warmup(config: Config, value: float, world_size: int) -> Config:
    return {f"{SCHEDULER}.params.warmup": {"epochs": value} if value else 0}


def early_stopping(config: Config, value: int, world_size: int) -> Config:
    """Epochs without a better value, as evaluations; none for 0."""
    if value < 0:
        raise ConfigError(f"--early_stopping {value}: give a number of epochs, or 0 for never")
    if value == 0:
        return {"training.early_stopping": None}
    every = value_at(config, "training.eval_every")
    if not isinstance(every, dict):
        raise ConfigError(
            f"--early_stopping {value}: counts epochs, and this run evaluates by steps: set training.eval_every to "
            '{"epochs": 1}, or set training.early_stopping.patience, which counts evaluations'
        )
    patience = max(1, round(value / every["epochs"]))
    if value_at(config, "training.early_stopping") is None:
        return {"training.early_stopping": {"patience": patience}}
    return {"training.early_stopping.patience": patience}


def auto_resume(config: Config, value: bool, world_size: int) -> Config:
    return {"--resume": "auto" if value else "none"}


def task_name(config: Config, value: str, world_size: int) -> Config:
    """The run's name there, and the name of its folder."""
    folder = re.sub(r"[^\w.-]+", "-", value).strip(".-") or "run"
    if folder != value:  # or "a b" would continue what "a/b" has begun
        folder += f"-{hashlib.sha256(value.encode()).hexdigest()[:6]}"
    return {"training.tracked.run": value, "--output-dir": Path("runs/image_classification", folder)}


def tracking_uri(config: Config, value: str, world_size: int) -> Config:
    return {"training.tracked.uri": value, "training.trackers": [*_other_trackers(config), "mlflow"]}


def disable_mlflow(config: Config, value: bool | str, world_size: int) -> Config:
    with_it = _has_mlflow(config) if value == WHERE_INSTALLED else not value
    return {"training.trackers": [*_other_trackers(config), *["mlflow"] * with_it]}


def _has_mlflow(config: Config) -> bool:
    """Whether it is installed, and has a place for runs: mlflow-skinny has no database, which is MLflow's default."""
    place = value_at(config, "training.tracked.uri") or os.environ.get("MLFLOW_TRACKING_URI")
    needed = ("mlflow",) if place else ("mlflow", "sqlalchemy")
    return all(importlib.util.find_spec(name) is not None for name in needed)


def _other_trackers(config: Config) -> list[str]:
    return [name for name in value_at(config, "training.trackers") or ["tensorboard"] if name != "mlflow"]


def only_val(config: Config, value: bool, world_size: int) -> Config:
    """Evaluate what the run's folder holds, on the validation images that the command line names."""
    if not value:
        return {}
    if world_size > 1:
        raise ConfigError(f"--only_val: one process evaluates, and these are {world_size}: start it with python")
    if value_at(config, "training.start_from") is not None:
        raise ConfigError(
            "--only_val: evaluates a run of this program: start one from the file, --load_model FILE --epochs N with "
            "the file's epoch as N, and evaluate that"
        )
    if value_at(config, "data.val_size") is not None:
        raise ConfigError("--only_val: measures all of val/: leave --val_size out")
    where = ("--data-path", "data.path") if value_at(config, "data.store") is None else ("--store", "data.store")
    flags, micro = [where[0], str(value_at(config, where[1]))], value_at(config, MICRO)
    if isinstance(micro, int):
        flags += ["--batch-size", str(micro)]
    return {"--instead": ["evaluate", "--split", "val", *flags]}


def export_onnx(config: Config, value: bool | str, world_size: int) -> Config:
    installed = all(importlib.util.find_spec(name) is not None for name in ("onnxruntime", "onnxscript"))
    return {"--onnx": installed if value == WHERE_INSTALLED else value}


def skip_upload(config: Config, value: bool, world_size: int) -> Config:
    return {"training.tracked.leave_out": ["best", "best.pth"] if value else []}


FLAGS = (
    Flag("list-models", "print the networks of a series, or all, and end", str, list_models, alone=""),
    Flag("device", "GPUs to use, such as 0,1,2,3; or cpu", str, devices),
    Flag("distributed", "on several processes, which torchrun or deepspeed starts", bool, distributed),
    Flag("data_path", "folder with train/ and val/, or a prepared one", str, data_path,
         required=("data.path", "data.store")),
    Flag("train_size", "training images in all, drawn with seed 42", int, "data.train_size"),
    Flag("val_size", "validation images in all, drawn with seed 42", int, "data.val_size"),
    Flag("size_per_class", "train_size and val_size are of each class", bool, "data.size_per_class"),
    Flag("img_size", "edge in pixels", int, "data.img_size", default=224),
    Flag("arch", "the network, or a Hugging Face folder", architecture, network, default="resnet18"),
    Flag("pretrained", "file of weights to begin with", str, pretrained, alone=""),
    Flag("load_model", "best.pth to begin with: weights, optimizer, epoch", str, "training.start_from"),
    Flag("batch_size", "images per GPU", int, images_per_gpu, default=256),
    Flag("grad_acc", "micro-batches a step: -1 for one, 0 for about 256 images", int, accumulation, default=0),
    replace(LENGTH[0], default=100),
    Flag("amp", "mixed precision, which is on by default on a GPU", bool, mixed_precision, default=BY_DEVICE),
    Flag("scheduler_type", f"one of {', '.join(SHAPES)}", one_of(SHAPES), shape, default="cosine"),
    Flag("optimizer", f"one of {', '.join(OPTIMIZERS)}", one_of(OPTIMIZERS), optimizer, default="Adam"),
    Flag("lr0", "the rate after the warm-up", float, RATE, default=0.01),
    Flag("lrf", "the last rate as a share of lr0", float, f"{SCHEDULER}.params.min_ratio", default=0.1),
    Flag("min_lr", "the lowest rate", float, lowest_rate, default=HUNDREDTH),
    Flag("wd", "weight decay, of norms and biases too", float, decay_of_all, default=0.01),
    Flag("warmup_epochs", "epochs of warm-up", float, warmup, default=3),
    Flag("early_stopping", "epochs without a gain before it stops; 0: never", int, early_stopping, default=100),
    Flag("auto_resume", "resume from what the run's folder holds", bool, auto_resume, default=True),
    Flag("project_name", "MLflow's experiment; ai-classifier unless given", str, "training.tracked.experiment"),
    Flag("task_name", "the run's name in MLflow, and of its folder", str, task_name),
    Flag("model_path", "the run's folder, which best.pth is in", Path,
         lambda config, value, world_size: {"--output-dir": value}),
    Flag("mlflow_tracking_uri", "MLflow's server, database or folder", str, tracking_uri),
    Flag("disable_mlflow", "leave MLflow out", bool, disable_mlflow, default=WHERE_INSTALLED),
    Flag("skip_mlflow_model_upload", "keep the weights here", bool, skip_upload),
    Flag("only_val", "evaluate the run's best weights on all of val/, with its own network and size", bool, only_val),
    Flag("export_onnx", "write best/model.onnx in the end", bool, export_onnx, default=WHERE_INSTALLED),
)  # fmt: skip
DEFAULTS = Path(__file__).with_name("default.json")
