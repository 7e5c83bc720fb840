"""A folder of images and a run over it with a small network, as the engine leaves one, but untrained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from tests.models.image_classification.image_tree import write_tree
from trunkline.engine.checkpoint.weights import FINGERPRINT
from trunkline.models.image_classification.config import ImageData, ImageModel
from trunkline.models.image_classification.task import ImageTask

CLASSES = ("cat", "dog", "newt")
EDGE = 16


def write_images(root: Path) -> Path:
    """12 images to train on, 7 to validate on and 5 to test on, 20 x 24 pixels of noise."""
    counts = {"train": (4, 4, 4), "val": (3, 3, 1), "test": (2, 2, 1)}
    return write_tree(
        root,
        [
            f"{split}/{name}/{split}-{name}-{place}.png"
            for split, of_classes in counts.items()
            for name, count in zip(CLASSES, of_classes, strict=True)
            for place in range(count)
        ],
    )


def small_network(num_classes: int = len(CLASSES)) -> ResNetForImageClassification:
    """A ResNet of one block a stage, whose BatchNorms have seen something."""
    torch.manual_seed(0)
    network = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=num_classes
        )
    )  # fmt: skip
    network.train()(pixel_values=torch.randn(8, 3, EDGE, EDGE))
    nn.init.normal_(network.classifier[1].weight)
    return network.eval()


def small_task(root: Path, images: Path, data: dict[str, Any] | None = None, **model: Any) -> ImageTask:
    """The workload over the images, with the small network from a folder of Hugging Face's."""
    if not (root / "small").exists():
        small_network().save_pretrained(root / "small")
    return ImageTask(
        ImageData(path=str(images), img_size=EDGE, **(data or {})), ImageModel(path=str(root / "small"), **model)
    )


def write_run(root: Path, images: Path, **data: Any) -> Path:
    """Write root/run/ and root/run/best/; returns the run."""
    task = small_task(root, images, data)
    network = task.build_model()
    network.load_state_dict(small_network().state_dict())
    best = root / "run" / "best"
    best.mkdir(parents=True)
    sections: dict[str, Any] = {"workload": "image_classification", FINGERPRINT: task.fingerprint()}
    sections |= {"data": task.data.model_dump(), "model": task.model.model_dump()}
    (best / "config.json").write_text(json.dumps(task.save_assets(best) | sections))
    (root / "run" / "config.json").write_text(json.dumps(sections))
    tensors = task.file_tensors(dict(network.state_dict()))
    save_file({name: each.contiguous() for name, each in tensors.items()}, best / "model.safetensors", {"step": "7"})
    return root / "run"
