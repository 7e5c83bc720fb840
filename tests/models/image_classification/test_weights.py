"""Weights that a network begins with: torchvision's layout in plain torch, wrappers, heads, damaged folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.models.image_classification.test_normalization import tiny_resnet
from tests.models.image_classification.tiny_pictures import picture_config, picture_folder, train
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.errors import CheckpointError, TrunklineError
from trunkline.models.image_classification.config import ImageModel
from trunkline.models.image_classification.network import begin_with, make_network
from trunkline.models.registry import make_task


class Basic(nn.Module):
    """torchvision's BasicBlock."""

    expansion = 1

    def __init__(self, before: int, wide: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, wide, 3, stride, 1, bias=False), nn.BatchNorm2d(wide)
        self.conv2, self.bn2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False), nn.BatchNorm2d(wide)
        self.downsample = shortcut(before, wide, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class Bottleneck(nn.Module):
    """torchvision's, with the stride in the 3 x 3 convolution (v1.5)."""

    expansion = 4

    def __init__(self, before: int, wide: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.conv2, self.bn2 = nn.Conv2d(wide, wide, 3, stride, 1, bias=False), nn.BatchNorm2d(wide)
        self.conv3, self.bn3 = nn.Conv2d(wide, 4 * wide, 1, bias=False), nn.BatchNorm2d(4 * wide)
        self.downsample = shortcut(before, 4 * wide, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        y = self.bn3(self.conv3(y))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


def shortcut(before: int, after: int, stride: int) -> nn.Sequential | None:
    if (before, stride) == (after, 1):
        return None
    return nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))


class TorchvisionResNet(nn.Module):
    def __init__(self, block: type[Basic | Bottleneck], depths: tuple[int, ...], classes: int = 5) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        before = 64
        for place, depth in enumerate(depths):
            layers, wide = [], 64 << place
            for layer in range(depth):
                layers.append(block(before, wide, 2 if layer == 0 < place else 1))
                before = wide * block.expansion
            setattr(self, f"layer{place + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        for place in range(1, 5):
            x = getattr(self, f"layer{place}")(x)
        return self.fc(x.mean((2, 3)))


RESNETS: dict[str, tuple[type[Basic | Bottleneck], tuple[int, ...]]] = {
    "resnet18": (Basic, (2, 2, 2, 2)), "resnet34": (Basic, (3, 4, 6, 3)), "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)), "resnet152": (Bottleneck, (3, 8, 36, 3)),
}  # fmt: skip


def torchvision_resnet(arch: str) -> TorchvisionResNet:
    """With values that keep activations near 1, and statistics that are no new network's."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        network = TorchvisionResNet(*RESNETS[arch])
    network = network.to_empty(device="cpu").eval()
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 4:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif tensor.is_floating_point():
            low = 0.3 if name.endswith(("weight", "var")) else -0.1
            tensor.uniform_(low, low + 0.4, generator=generator)
        else:
            tensor.fill_(7)
    return network


X = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))


def loaded(arch: str, path: Path, classes: int = 5) -> tuple[Any, str]:
    model = ImageModel(arch=arch, pretrained=str(path))
    with torch.device("meta"):
        network = make_network(model, classes, 40)
    network = network.to_empty(device="cpu")
    (note,) = begin_with(network, model)
    return network.eval(), note


@pytest.mark.parametrize(
    "arch",
    [pytest.param(arch, marks=[pytest.mark.slow] if arch in ("resnet34", "resnet101") else []) for arch in RESNETS],
)
@torch.no_grad()
def test_weights_of_torchvision_and_timm_give_their_logits(tmp_path: Path, arch: str) -> None:
    theirs = torchvision_resnet(arch)
    path = tmp_path / ("weights.pth" if arch in ("resnet18", "resnet101") else "model.safetensors")
    if path.suffix == ".pth":
        torch.save(theirs.state_dict(), path)
    else:
        save_file(theirs.state_dict(), path)
    network, note = loaded(arch, path)
    wanted = theirs(X)
    assert wanted.isfinite().all()
    assert wanted.std() > 0.1
    assert torch.equal(network(pixel_values=X).logits, wanted)
    assert "new are" not in note


@torch.no_grad()
def test_the_originals_files_and_fastais_are_read(tmp_path: Path) -> None:
    theirs = torchvision_resnet("resnet18")
    state = theirs.state_dict()
    best = {
        "model": {f"model.{name}": tensor for name, tensor in state.items()}, "opt": {"state": {}}, "epoch": 3,
        "loss": np.float64(0.25), "img_size": 40, "arch": "resnet18",
    }  # fmt: skip
    torch.save(best, tmp_path / "best.pth")
    assert torch.equal(loaded("resnet18", tmp_path / "best.pth")[0](pixel_values=X).logits, theirs(X))

    head = {"1.2.weight": torch.ones(1024), "1.8.weight": torch.ones(5, 512)}
    body = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    numbers = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    by_number = {f"0.{numbers[name.split('.')[0]]}.{name.partition('.')[2]}": tensor for name, tensor in body.items()}
    by_name = {f"0.model.{name}": tensor for name, tensor in body.items()}
    for named in (by_number, by_name):
        torch.save({"model": named | head}, tmp_path / "fastai.pth")
        network, note = loaded("resnet18", tmp_path / "fastai.pth")
        assert note.endswith("120 tensors loaded; new are classifier.1.weight, classifier.1.bias")
        network.classifier[1].load_state_dict(theirs.fc.state_dict())
        assert torch.equal(network(pixel_values=X).logits, theirs(X))


def test_another_number_of_classes_has_a_head_of_its_own_and_says_so(tmp_path: Path) -> None:
    torch.save(torchvision_resnet("resnet18").state_dict(), tmp_path / "weights.pth")
    _, note = loaded("resnet18", tmp_path / "weights.pth", classes=3)
    assert note == f"{tmp_path}/weights.pth: 120 tensors loaded; new are classifier.1.weight, classifier.1.bias"
    tiny_resnet().save_pretrained(tmp_path / "tiny")
    begin = load_file(tmp_path / "tiny" / "model.safetensors")
    network = make_network(model := ImageModel(path=str(tmp_path / "tiny")), 7, 16)
    head = network.classifier[1].weight.detach().clone()  # type: ignore[union-attr, index, operator]
    assert begin_with(network, model) == [
        f"{tmp_path}/tiny: weights of ResNetForImageClassification; the head for 7 classes is new, since that of the "
        "folder is for 3"
    ]
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, head if name == "classifier.1.weight" else tensor)
        if "classifier" not in name:
            assert torch.equal(tensor, begin[name])


def test_weights_that_do_not_fit_are_one_error(tmp_path: Path) -> None:
    torch.save(torchvision_resnet("resnet34").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"model\.pretrained: .*weights\.pth: does not fit this model:") as raised:
        loaded("resnet18", tmp_path / "weights.pth")
    assert "tensors there that the model does not have: resnet.encoder.stages.0.layers.2" in str(raised.value)


def damaged(folder: Path, case: str) -> None:
    config, weights = folder / "config.json", folder / "model.safetensors"
    values = json.loads(config.read_text())
    if case == "no config":
        config.unlink()
    elif case == "broken config":
        config.write_text("{")
    elif case == "quantized":
        config.write_text(json.dumps(values | {"quantization_config": {"quant_method": "gptq"}}))
    elif case == "a language model":
        config.write_text(json.dumps({"model_type": "llama"}))
    elif case == "code":
        config.write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}))
        (folder / "mine.py").write_text("raise SystemExit('ran')")
    elif case in ("integers", "infinity"):
        held = load_file(weights)
        broken = held["classifier.1.weight"]
        held["classifier.1.weight"] = broken.to(torch.int8) if case == "integers" else broken / 0
        save_file(held, weights, metadata={"format": "pt"})
    elif case == "no weights":
        weights.unlink()
    elif case == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif case == "another network":
        config.write_text(json.dumps(values | {"depths": [2, 1]}))
    elif case == "other widths":
        config.write_text(json.dumps(values | {"hidden_sizes": [8, 24]}))
    elif case == "grey":
        config.write_text(json.dumps(values | {"num_channels": 1}))


def begin(config: RunConfig) -> None:
    task = make_task(config)
    task.initialize(task.build_model())


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("no config", "holds no config.json; give the folder of an image classifier"),
        ("broken config", r"cannot be read"),
        ("quantized", "quantization_config: training needs whole weights"),
        ("a language model", "cannot be read: ValueError: Unrecognized configuration class"),
        ("code", "cannot be read: ValueError: "),
        ("no weights", "cannot be read: OSError: "),
        ("integers", r"holds no finite floating-point numbers in classifier\.1\.weight: give weights"),
        ("infinity", r"holds no finite floating-point numbers in classifier\.1\.weight: give weights"),
        ("cut weights", "cannot be read: "),
        ("another network", r"do not fit its config.json; missing or of another shape: resnet.encoder.stages.0"),
        ("other widths", r"stages.1.layers.0.layer.0.convolution.weight is \[16, 8, 3, 3\], not \[24, 8, 3"),
        ("grey", "cannot see images of that size: ValueError: Make sure that the channel dimension"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_one_error(tmp_path: Path, case: str, said: str) -> None:
    tiny_resnet().save_pretrained(tmp_path / "tiny")
    damaged(tmp_path / "tiny", case)
    images = picture_folder(tmp_path / "pictures", train=3, val=3)
    config = picture_config(tmp_path, images, {"path": str(tmp_path / "tiny")})
    with pytest.raises(TrunklineError, match=said):
        begin(config)


@pytest.mark.parametrize("broken", [lambda tensor: tensor / 0, lambda tensor: tensor.to(torch.int8)])
def test_weights_that_transformers_renames_are_looked_at_and_a_head_that_is_not_taken_is_not(
    tmp_path: Path, broken: Callable[[Tensor], Tensor]
) -> None:
    """A base model's names have no `resnet.` before them."""
    (whole := tiny_resnet()).resnet.save_pretrained(tmp_path / "base")
    whole.save_pretrained(tmp_path / "whole")
    network = make_network(model := ImageModel(path=str(tmp_path / "base")), 7, 16)
    begin_with(network, model)
    damage(tmp_path / "base", "embedder.embedder.convolution.weight", broken)
    with pytest.raises(CheckpointError, match=r"no finite .* in (resnet\.)?embedder.embedder.convolution.weight: give"):
        begin_with(network, model)
    damage(tmp_path / "whole", "classifier.1.weight", broken)
    model = ImageModel(path=str(tmp_path / "whole"))
    assert "the head for 7 classes is new" in begin_with(make_network(model, 7, 16), model)[0]


def damage(folder: Path, name: str, broken: Callable[[Tensor], Tensor]) -> None:
    held = load_file(folder / "model.safetensors")
    save_file(held | {name: broken(held[name])}, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_run_begins_with_the_best_of_another_and_resumes_without_it(tmp_path: Path) -> None:
    images = picture_folder(tmp_path / "pictures")
    first = picture_config(tmp_path, images, {"arch": "resnet_tiny", "batch_norm_group": 16}, training={"steps": 2})
    train(tmp_path / "first", first)
    best = tmp_path / "first" / "best"
    model = {"arch": "resnet_tiny", "batch_norm_group": 16, "pretrained": str(best)}
    rules = [{"names": ["resnet.*"], "frozen": True}]
    config = picture_config(tmp_path, images, model, training={"steps": 2, "save_every": 1, "parameters": rules})
    train(tmp_path / "second", config)
    one, two = (load_file(tmp_path / run / "best" / "model.safetensors") for run in ("first", "second"))
    assert {name for name in one if not torch.equal(one[name], two[name])} == {
        "classifier.1.weight",
        "classifier.1.bias",
    }
    shutil.rmtree(best)
    again = train(tmp_path / "again", config, resume=str(tmp_path / "second" / "checkpoints" / "step-00000001"))
    for name, tensor in again.backend.module.state_dict().items():
        assert torch.equal(tensor, two[name]), name
