"""The names of a ResNet's tensors: torchvision's, which are timm's, FastAI's, and transformers', which are ours.

from_torchvision("layer1.0.conv1.weight")    "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"
torchvision_names(names)                     the way back, of a whole network
in_torchvision_order(name)                   a sort key: the order of torchvision's parameters()
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_STEM = "resnet.embedder.embedder."
_LAYER = re.compile(
    r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.(?:layer\.(\d+)|(shortcut))\.(convolution|normalization)\."
)
_HEAD = "classifier.1."

_CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
"""FastAI's body of a network of torchvision: its children by number."""
_KINDS = {"conv": "convolution", "bn": "normalization"}


def from_torchvision(name: str) -> str | None:
    """transformers' name of a ResNet's tensor that torchvision, timm or FastAI named; None of FastAI's head."""
    if re.match(r"1\.\d", name):
        return None
    name = name.removeprefix("0.model.")
    if (found := re.fullmatch(r"0\.(\d)\.(.+)", name)) and found[1] in _CHILDREN:
        name = f"{_CHILDREN[found[1]]}.{found[2]}"
    if found := re.fullmatch(r"(conv|bn)1\.(\w+)", name):
        return f"resnet.embedder.embedder.{_KINDS[found[1]]}.{found[2]}"
    if found := re.fullmatch(r"layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)\.(\w+)", name):
        stage, layer, kind, place = int(found[1]) - 1, found[2], found[3], int(found[4])
        inside = f"layer.{place - 1}.{_KINDS[kind]}" if kind in _KINDS else f"shortcut.{list(_KINDS.values())[place]}"
        return f"resnet.encoder.stages.{stage}.layers.{layer}.{inside}.{found[5]}"
    return re.sub(r"^fc\.", "classifier.1.", name)


def is_resnet_of_transformers(names: Iterable[str]) -> bool:
    """Whether these are the names of a network that has other names in torchvision."""
    return any(name.startswith(_STEM) for name in names)


def torchvision_names(names: Iterable[str]) -> dict[str, str]:
    """What torchvision calls each tensor of transformers' ResNet; names of any other network stay."""
    names = list(names)
    if not is_resnet_of_transformers(names):
        return {name: name for name in names}
    stem = {f"{_STEM}convolution.": "conv1.", f"{_STEM}normalization.": "bn1.", _HEAD: "fc."}
    called = {}
    for name in names:
        begins = next((each for each in stem if name.startswith(each)), "")
        called[name] = stem[begins] + name.removeprefix(begins) if begins else _LAYER.sub(_block, name)
    return called


def _block(found: re.Match[str]) -> str:
    stage, layer, place, shortcut, kind = found.groups()
    if shortcut:
        part = f"downsample.{'01'[kind == 'normalization']}"
    else:
        part = f"{'bn' if kind == 'normalization' else 'conv'}{int(place) + 1}"
    return f"layer{int(stage) + 1}.{layer}.{part}."


def in_torchvision_order(name: str) -> tuple[Any, ...]:
    """A sort key: torchvision's ResNet has a block's shortcut last, transformers' has it first."""
    block, part = re.match(r"(layer\d+\.\d+\.)?(.*)", name).groups()  # type: ignore[union-attr]
    stage, place = map(int, re.findall(r"\d+", block)) if block else (99 if part.startswith("fc.") else 0, 0)
    kind, number = re.match(r"(\D+?)\.?(\d*)\.", part).groups()  # type: ignore[union-attr]
    step = (9, int(number)) if kind == "downsample" else (int(number or 0), kind == "bn")
    return stage, place, *step, part.endswith("bias")
