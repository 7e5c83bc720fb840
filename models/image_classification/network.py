"""The networks: transformers' image classifiers, by name or from a folder.

model = make_network(model, num_classes)
model(pixel_values=x).logits             [B, num_classes] of x, [B, 3, S, S]
"""

from __future__ import annotations

from pathlib import Path

from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from trunkline.engine.checkpoint.weights import load_weights
from trunkline.engine.errors import ConfigError
from trunkline.models.image_classification.config import ImageModel


def make_network(model: ImageModel, num_classes: int, img_size: int) -> nn.Module:
    """A new network, initialised from torch's global generator. Raises ConfigError."""
    if model.arch != "resnet18":
        raise ConfigError(f"model.arch: unknown '{model.arch}'")
    return ResNetForImageClassification(
        ResNetConfig(
            num_channels=3,
            embedding_size=64,
            hidden_sizes=[64, 128, 256, 512],
            depths=[2, 2, 2, 2],
            layer_type="basic",
            downsample_in_bottleneck=False,
            num_labels=num_classes,
        )  # fmt: skip
    )


def trained_network(folder: Path, model: ImageModel, num_classes: int, img_size: int) -> nn.Module:
    """The network of a run with the weights of `folder`, such as its best/, which alone is read.

    Raises CheckpointError or ConfigError.
    """
    network = make_network(model, num_classes, img_size)
    load_weights(network, folder)
    return network
