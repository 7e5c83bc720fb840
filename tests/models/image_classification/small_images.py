"""A folder of small images, runs on it, and torchvision's ResNet in plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from trunkline.engine.config.run_config import RunConfig, checked
from trunkline.engine.ranks.distributed import start
from trunkline.engine.task import Sums
from trunkline.engine.trainer import Trainer
from trunkline.launchers.command_line import Command, parse
from trunkline.models.image_classification.task import ImageTask
from trunkline.models.registry import config_sections

CLASSES = ("bird", "cat", "dog")
EDGE = 16


def write_images(folder: Path, train: int = 4, val: int = 2) -> Path:
    """Images of a colour for each class, with noise; as many of each class."""
    draw = np.random.default_rng(7)
    for split, count in (("train", train), ("val", val)):
        for channel, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 120, (EDGE, EDGE, 3))
                pixels[..., channel] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{number}.png")
    return folder


def asked(*words: str, world_size: int = 1) -> tuple[Command, RunConfig]:
    """What the command line of the workload without a file comes to."""
    command = parse(["image_classification", *words])
    return command, checked(command.draft(world_size), config_sections)


class SmallTask(ImageTask):
    """The workload with a ResNet of two stages and 8,000 parameters."""

    def build_model(self) -> nn.Module:
        return small_resnet()

    def show(self, sums: Sums, folder: Path) -> None:
        """Nothing, which is quick."""


def small_resnet() -> nn.Module:
    """8,000 parameters in two stages."""
    return ResNetForImageClassification(
            ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic",
                         downsample_in_bottleneck=False, num_labels=len(CLASSES))
        )  # fmt: skip


def train(
    config: RunConfig, folder: Path, resume: str = "auto", task: type[ImageTask] = SmallTask, **how: Any
) -> Trainer:
    """A run that has trained, in this process."""
    trainer = Trainer(task(config.data, config.model), config, start(), folder, resume=resume, **how)
    trainer.run()
    return trainer


class PlainBlock(nn.Module):
    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = None
        if stride > 1 or width != out:
            self.downsample = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        same = x if self.downsample is None else self.downsample(x)
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + same)


class PlainResNet(nn.Module):
    """SmallTask's network, with torchvision's modules, names and order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(PlainBlock(8, 8, 1))
        self.layer2 = nn.Sequential(PlainBlock(8, 16, 2), PlainBlock(16, 16, 1))
        self.fc = nn.Linear(16, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))
