"""The flags of a trainer of picture classifiers, as its users type them; each in the place where it acts."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from trunkline.engine.config.draft import value_at
from trunkline.engine.config.flags import LENGTH, Flag
from trunkline.engine.errors import ConfigError

ARCHITECTURES = ("resnet18", "resnet34", "resnet50")
MICRO, STEPS = "deepspeed.train_micro_batch_size_per_gpu", "deepspeed.gradient_accumulation_steps"
RATE, RATIO = "deepspeed.optimizer.params.lr", "deepspeed.scheduler.params.min_ratio"

Config = dict[str, Any]


def batch_per_gpu(config: Config, value: int, world_size: int) -> Config:
    steps = value_at(config, STEPS)
    return sizes(value, steps if isinstance(steps, int) else auto_accumulation(value, world_size), world_size)


def accumulation(config: Config, value: int | str, world_size: int) -> Config:
    micro = value_at(config, MICRO)
    if value in ("auto", 0):
        return sizes(micro, auto_accumulation(micro, world_size), world_size) | {STEPS: "auto"}
    return sizes(micro, max(1, int(value)), world_size) | {STEPS: max(1, int(value))}


def auto_accumulation(micro: int, world_size: int) -> int:
    return max(1, 256 // (micro * world_size))


def sizes(micro: int, steps: int, world_size: int) -> Config:
    return {MICRO: micro, "deepspeed.train_batch_size": micro * steps * world_size}


def whole_or_auto(text: str) -> int | str:
    return text if text == "auto" else int(text)


def optimizer(config: Config, value: str, world_size: int) -> Config:
    own = {"SGD": {"momentum": 0.9, "nesterov": True}, "RMSprop": {"momentum": 0.9}}.get(value, {})
    params = {name: value_at(config, f"deepspeed.optimizer.params.{name}") for name in ("lr", "weight_decay")}
    return {"deepspeed.optimizer": {"type": value, "params": params | own}}


def schedule(config: Config, value: str, world_size: int) -> Config:
    if value == "cosine":
        return {}
    return {"deepspeed.scheduler": {"constant": None, "linear": {"type": "WarmupDecayLR", "params": {}}}[value]}


def lowest_rate(config: Config, value: float, world_size: int) -> Config:
    return {RATIO: max(value_at(config, RATIO), value / value_at(config, RATE))}


def warmup(config: Config, value: int, world_size: int) -> Config:
    return {"deepspeed.scheduler.params.warmup": value / value_at(config, "training.epochs")}


def devices(config: Config, value: str, world_size: int) -> Config:
    os.environ["CUDA_VISIBLE_DEVICES"] = value
    return {}


def many(config: Config, value: bool, world_size: int) -> Config:
    if value and world_size == 1:
        raise ConfigError("--distributed: this is one process: start with torchrun --nproc_per_node N, or deepspeed")
    return {}


def finetune(config: Config, value: bool, world_size: int) -> Config:
    return {"model.frozen": True, "model.pretrained": True, "training.epochs": 10, RATE: 5e-5} if value else {}


def tracking(config: Config, value: bool, world_size: int) -> Config:
    return {"training.trackers": ["tensorboard"] if value else ["tensorboard", "mlflow"]}


def list_models(config: Config, value: bool, world_size: int) -> Config:
    print("\n".join(ARCHITECTURES))
    raise SystemExit(0)


def only_val(config: Config, value: bool, world_size: int) -> Config:
    if value:
        raise ConfigError("--only_val: that is launchers/evaluate.py --run DIR")
    return {}


FLAGS = (
    Flag("list-models", "print the architectures and end", bool, list_models),
    Flag("only_val", "evaluate alone", bool, only_val),
    Flag("data_path", "folder with train/ and val/", str, "data.path", required=("data.path",)),
    Flag("train_size", "training pictures in all", int, "data.train_size"),
    Flag("val_size", "validation pictures in all", int, "data.val_size"),
    Flag("img_size", "edge in pixels", int, "data.img_size", default=224),
    Flag("arch", "the network", str, "model.arch", default="resnet18", choices=ARCHITECTURES),
    Flag("pretrained", "begin with published weights", bool, "model.pretrained", default=False),
    Flag("load_model", "begin with these weights", str, "model.load_model"),
    Flag("batch_size", "pictures per GPU", int, batch_per_gpu, default=256),
    Flag("grad_acc", "micro-batches a step; 0 or auto for 256 pictures, -1 for one", whole_or_auto, accumulation,
         default="auto"),
    Flag("optimizer", "which", str, optimizer, default="Adam", choices=("SGD", "Adam", "AdamW", "RMSprop")),
    Flag("is_finetune", "train the head alone", bool, finetune),
    replace(LENGTH[0], default=100),
    Flag("lr0", "first rate", float, RATE),
    Flag("wd", "weight decay", float, "deepspeed.optimizer.params.weight_decay"),
    Flag("lrf", "last rate as a share of lr0", float, RATIO),
    Flag("min_lr", "lowest rate", float, lowest_rate),
    Flag("warmup_epochs", "epochs of warm-up", int, warmup, default=3),
    Flag("scheduler_type", "which", str, schedule, default="cosine", choices=("cosine", "linear", "constant")),
    Flag("early_stopping", "epochs without improvement", int, "training.early_stopping.patience", default=100),
    Flag("auto_resume", "go on from what the run's folder holds", bool,
         lambda config, value, world_size: {"--resume": "auto" if value else "none"}, default=True),
    Flag("model_path", "the run's folder", Path, lambda config, value, world_size: {"--output-dir": value}),
    Flag("project_name", "experiment", str, "model.project_name", default="ai-classifier"),
    Flag("task_name", "run", str, "model.task_name"),
    Flag("disable_mlflow", "leave MLflow out", bool, tracking),
    Flag("skip_mlflow_model_upload", "keep the weights here", bool,
         lambda config, value, world_size: {"model.upload": not value}),
    Flag("device", "GPUs to use", str, devices),
    Flag("distributed", "on several processes", bool, many),
    Flag("export_onnx", "write ONNX at the end", bool, "model.export_onnx", default=True),
)  # fmt: skip
DEFAULTS = Path(__file__).with_name("default.json")
