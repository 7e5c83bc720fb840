"""The networks that `model.arch` names, and what transformers builds them from. Imports neither torch nor transformers.

architectures("resnet")     {"resnet18": 11689512, ...}: the names of a series, and their parameters at 1,000 classes
ARCHITECTURES["resnet18"]   its series, its model_type in transformers and the settings of its configuration

What transformers drops at random in training (Swin's paths, EfficientNet's connections) is off: it would depend on how
a batch is split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """parameters: at 1,000 classes, with images of 224 pixels."""

    series: str
    model_type: str
    parameters: int
    settings: dict[str, Any]


def _resnet(parameters: int, layer: str, depths: list[int], widths: list[int], stem: int = 64) -> Architecture:
    settings = {
        "embedding_size": stem, "hidden_sizes": widths, "depths": depths, "layer_type": layer,
        "downsample_in_bottleneck": False,
    }  # fmt: skip
    return Architecture("resnet", "resnet", parameters, settings)


_BASIC, _BOTTLENECK = [64, 128, 256, 512], [256, 512, 1024, 2048]
_VIT_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
_EFFICIENTNET_B0 = {
    "width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280, "dropout_rate": 0.0,
    "drop_connect_rate": 0.0, "batch_norm_momentum": 0.01,  # torch's weight of the new, where the paper's is of the old
}  # fmt: skip

ARCHITECTURES = {
    "resnet_tiny": _resnet(828_168, "basic", [2, 2, 2], [32, 64, 128], stem=32),
    "resnet18": _resnet(11_689_512, "basic", [2, 2, 2, 2], _BASIC),
    "resnet34": _resnet(21_797_672, "basic", [3, 4, 6, 3], _BASIC),
    "resnet50": _resnet(25_557_032, "bottleneck", [3, 4, 6, 3], _BOTTLENECK),
    "resnet101": _resnet(44_549_160, "bottleneck", [3, 4, 23, 3], _BOTTLENECK),
    "resnet152": _resnet(60_192_808, "bottleneck", [3, 8, 36, 3], _BOTTLENECK),
    "convnext_tiny": Architecture("convnext", "convnext", 28_589_128, {}),
    "vit_small_patch16": Architecture("vit", "vit", 22_050_664, _VIT_SMALL),
    "vit_base_patch16": Architecture("vit", "vit", 86_567_656, {}),
    "swin_tiny": Architecture("swin", "swin", 28_288_354, {"drop_path_rate": 0.0}),
    "efficientnet_b0": Architecture("efficientnet", "efficientnet", 5_288_548, _EFFICIENTNET_B0),
}
"""By name. resnet_tiny is for images of some 28 to 64 pixels, such as digits."""
BATCH_NORMALIZED = ("resnet", "efficientnet")
"""The series whose networks have BatchNorms."""


def architectures(series: str = "") -> dict[str, int]:
    """The names of a series, or those that contain the text, with their parameters at 1,000 classes; "": all."""
    return {name: each.parameters for name, each in ARCHITECTURES.items() if series in name or series == each.series}
