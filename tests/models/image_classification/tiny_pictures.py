"""A folder of small pictures, and runs over them in which the network sees them as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tests.engine.tiny import lay_over
from trunkline.engine.config.run_config import RunConfig, load_config
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.models.image_classification.config import IMAGENET_MEAN, IMAGENET_STD
from trunkline.models.registry import config_sections, make_task

CLASSES = ("bright", "dark", "green")
NO_AUGMENTATION = {"flip": 0, "rotate": 0, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}


def picture_folder(root: Path, train: int = 45, val: int = 9, size: int = 16) -> Path:
    """PNGs of noise with a tint of their class, root/{train,val}/{class}/{number}.png."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            place = number % len(CLASSES)
            pixels = generator.integers(0, 200, (size, size, 3))
            pixels[..., place] += 40
            folder = root / split / CLASSES[place]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03}.png")
    return root


def picture_config(folder: Path, images: Path, model: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    """A run over the pictures, with these sections laid over the defaults, through the real loader."""
    raw: dict[str, Any] = {
        "workload": "image_classification",
        "data": {"path": str(images), "img_size": 16, "augmentation": NO_AUGMENTATION},
        "model": model,
        "training": {"steps": 12, "eval_every": 99, "save_every": 99, "log_every": 1, "trackers": []},
        "deepspeed": {
            "train_batch_size": 16,
            "optimizer": {"type": "SGD", "params": {"lr": 0.02, "momentum": 0.9}},
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 0},
        },
    }
    lay_over(raw, sections)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pictures.json"
    path.write_text(json.dumps(raw))
    return load_config(path, sections=config_sections)


def train(run: Path, config: RunConfig, backend: str = "deepspeed", resume: str = "none") -> Trainer:
    """The trainer after its run."""
    trainer = Trainer(make_task(config), config, start(), run, backend=backend, resume=resume)
    trainer.run()
    return trainer


def losses(run: Path) -> list[float]:
    """The training loss of each step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "train"]


def read(images: Path, split: str) -> tuple[Tensor, Tensor]:
    """The pictures normalised, fp32 [N, 3, S, S], and their classes, int64 [N], by class and then by name."""
    pixels, labels = [], []
    for place, name in enumerate(CLASSES):
        for path in sorted((images / split / name).iterdir()):
            pixels.append(torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255)
            labels.append(place)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    return (torch.stack(pixels) - mean) / std, torch.tensor(labels)
