"""Weights of other projects: torchvision's names onto transformers' ResNet, wrappers, ties, and hostile files."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from trunkline.engine.checkpoint.foreign import load_foreign, read_foreign, read_torch
from trunkline.engine.errors import CheckpointError

WIDTHS = (64, 128, 256, 512)


def torchvision_resnet18(classes: int = 10) -> dict[str, Tensor]:
    """A state dict by torchvision's rules for names and shapes."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def convolution(name: str, wide: int, deep: int, kernel: int) -> None:
        state[f"{name}.weight"] = torch.randn(wide, deep, kernel, kernel, generator=generator) * (deep * kernel) ** -0.5

    def norm(name: str, wide: int) -> None:
        for part in ("weight", "running_var"):
            state[f"{name}.{part}"] = torch.rand(wide, generator=generator) + 0.5
        for part in ("bias", "running_mean"):
            state[f"{name}.{part}"] = torch.randn(wide, generator=generator) * 0.1
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    convolution("conv1", 64, 3, 7)
    norm("bn1", 64)
    before = 64
    for layer, wide in enumerate(WIDTHS, 1):
        for block in range(2):
            for place in (1, 2):
                convolution(f"layer{layer}.{block}.conv{place}", wide, before if place == 1 else wide, 3)
                norm(f"layer{layer}.{block}.bn{place}", wide)
                if place == 1 and before != wide:
                    convolution(f"layer{layer}.{block}.downsample.0", wide, before, 1)
                    norm(f"layer{layer}.{block}.downsample.1", wide)
                before = wide
    state["fc.weight"] = torch.randn(classes, 512, generator=generator) * 0.05
    state["fc.bias"] = torch.randn(classes, generator=generator)
    return state


def forward_of_torchvision(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """ResNet-18 in torch's functions alone."""

    def conv_norm(x: Tensor, conv: str, norm: str, stride: int, padding: int) -> Tensor:
        x = F.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=padding)
        parts = (state[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts)

    x = F.max_pool2d(conv_norm(x, "conv1", "bn1", 2, 3).relu(), 3, 2, 1)
    for layer in range(1, 5):
        for block in range(2):
            name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            inner = conv_norm(x, f"{name}.conv1", f"{name}.bn1", stride, 1).relu()
            inner = conv_norm(inner, f"{name}.conv2", f"{name}.bn2", 1, 1)
            if f"{name}.downsample.0.weight" in state:
                x = conv_norm(x, f"{name}.downsample.0", f"{name}.downsample.1", stride, 0)
            x = (x + inner).relu()
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


def transformers_name(name: str) -> str | None:
    part = {"conv": "convolution", "bn": "normalization", "0": "convolution", "1": "normalization"}
    if found := re.fullmatch(r"(conv|bn)1\.(\w+)", name):
        return f"resnet.embedder.embedder.{part[found[1]]}.{found[2]}"
    if found := re.fullmatch(r"layer(\d)\.(\d+)\.(conv|bn)(\d)\.(\w+)", name):
        stage, block, kind, place, rest = found.groups()
        return f"resnet.encoder.stages.{int(stage) - 1}.layers.{block}.layer.{int(place) - 1}.{part[kind]}.{rest}"
    if found := re.fullmatch(r"layer(\d)\.(\d+)\.downsample\.([01])\.(\w+)", name):
        stage, block, kind, rest = found.groups()
        return f"resnet.encoder.stages.{int(stage) - 1}.layers.{block}.shortcut.{part[kind]}.{rest}"
    return f"classifier.1.{name.removeprefix('fc.')}" if name.startswith("fc.") else name


def resnet18(classes: int = 10) -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=64, hidden_sizes=list(WIDTHS), depths=[2] * 4, layer_type="basic", num_labels=classes
        )
    ).eval()


def test_torchvision_s_resnet_computes_the_same_under_transformers_names(tmp_path: Path) -> None:
    state = torchvision_resnet18()
    torch.save(state, tmp_path / "resnet18.pth")
    model = resnet18()
    line = load_foreign(model, tmp_path / "resnet18.pth", transformers_name)
    assert line == f"{tmp_path / 'resnet18.pth'}: {len(state)} tensors loaded"
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(x).logits, forward_of_torchvision(state, x), rtol=0, atol=1e-5)

    other = resnet18(classes=3)
    head = {name: tensor.clone() for name, tensor in other.state_dict().items() if name.startswith("classifier")}
    line = load_foreign(other, tmp_path / "resnet18.pth", transformers_name, fresh=["classifier.*"])
    assert line.endswith(f"{len(state) - 2} tensors loaded; new are classifier.1.weight, classifier.1.bias")
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in head.items())
    assert torch.equal(other.state_dict()["resnet.embedder.embedder.convolution.weight"], state["conv1.weight"])
    with pytest.raises(CheckpointError, match=r"2 tensors of another shape: classifier\.1\.weight is \[10, 512\], but"):
        load_foreign(other, tmp_path / "resnet18.pth", transformers_name)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)


STATE = {name: torch.randn_like(tensor.float()) for name, tensor in Small().state_dict().items() if "num" not in name}


def is_loaded(model: nn.Module) -> bool:
    return all(torch.equal(model.state_dict()[name], tensor) for name, tensor in STATE.items())


@pytest.mark.parametrize(
    ("held", "stripped"),
    [
        (STATE, ""),
        ({"state_dict": STATE, "epoch": 3}, ""),
        ({"model": {f"module.{name}": tensor for name, tensor in STATE.items()}, "opt": {"state": {}}}, "module."),
        ({f"module._orig_mod.{name}": tensor for name, tensor in STATE.items()}, "module._orig_mod."),
        ({"epoch": 3, "model": {f"model.{name}": tensor for name, tensor in STATE.items()}}, "model."),
        ({"model": STATE, "loss": np.float64(0.25), "count": np.int64(4), "arch": "small"}, ""),
    ],
)
def test_what_programs_put_around_a_state_dict_is_taken_off(tmp_path: Path, held: Any, stripped: str) -> None:
    torch.save(held, tmp_path / "best.pth")
    model = Small()
    assert ("without" in (line := load_foreign(model, tmp_path / "best.pth"))) == bool(stripped)
    assert stripped in line
    assert is_loaded(model)
    if "loss" in held:
        assert (read_torch(tmp_path / "best.pth")["loss"], read_torch(tmp_path / "best.pth")["count"]) == (0.25, 4)


def test_a_prefix_that_the_model_s_own_names_have_stays(tmp_path: Path) -> None:
    outer = nn.ModuleDict({"model": Small()})
    torch.save({f"model.{name}": tensor for name, tensor in STATE.items()}, tmp_path / "weights.bin")
    assert "without" not in load_foreign(outer, tmp_path / "weights.bin")
    assert is_loaded(outer["model"])


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_folders_are_read_in_one_file_or_in_several(tmp_path: Path, kind: str) -> None:
    save: Any = save_file if kind == "safetensors" else torch.save
    stem = "model" if kind == "safetensors" else "pytorch_model"
    (tmp_path / "one").mkdir()
    save(STATE, tmp_path / f"one/{stem}.{kind}")
    (tmp_path / "two").mkdir()
    names = sorted(STATE)
    places = {name: f"{stem}-0000{1 + place % 2}-of-00002.{kind}" for place, name in enumerate(names)}
    for file in set(places.values()):
        save({name: STATE[name] for name in names if places[name] == file}, tmp_path / "two" / file)
    index = tmp_path / f"two/{stem}.{kind}.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    for folder in ("one", "two"):
        model = Small()
        load_foreign(model, tmp_path / folder)
        assert is_loaded(model)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.bin"}}))
    with pytest.raises(CheckpointError, match=f"weight_map must name .{kind} files of this folder"):
        read_foreign(tmp_path / "two")


def test_a_table_renames_and_leaves_out_and_a_function_reshapes(tmp_path: Path) -> None:
    held = {"a.kernel": STATE["first.weight"].T.contiguous(), "a.bias": STATE["first.bias"], "step": torch.tensor(3)}
    held |= {name: tensor for name, tensor in STATE.items() if not name.startswith("first")}
    torch.save(held, tmp_path / "weights.pt")
    table = {"a.kernel": "first.weight", "a.bias": "first.bias", "step": None}
    model = Small()
    load_foreign(model, tmp_path / "weights.pt", table, reshape=lambda name, t: t.T if name == "first.weight" else t)
    assert is_loaded(model)


def test_what_does_not_fit_is_listed_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    held = {name: tensor for name, tensor in STATE.items() if name != "second.bias"}
    held |= {"first.weight": torch.zeros(5, 3)} | {f"extra.{place}": torch.zeros(1) for place in range(12)}
    torch.save(held, tmp_path / "weights.pth")
    model = Small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_foreign(model, tmp_path / "weights.pth")
    message = str(caught.value)
    assert "1 tensors of the model that are missing there: second.bias\n" in message
    assert "12 tensors there that the model does not have: extra.0, extra.1, " in message
    assert "extra.9 and 2 more\n" in message
    assert "1 tensors of another shape: first.weight is [5, 3], but [4, 3] in the model\n" in message
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    "broken",
    [
        lambda tensor: (10 * tensor).to(torch.int8),
        lambda tensor: tensor > 0,
        lambda tensor: torch.complex(tensor, tensor),
        lambda tensor: tensor.to_sparse(),
        lambda tensor: tensor / 0,
    ],
)
def test_what_is_no_finite_number_for_each_element_is_listed(
    tmp_path: Path, broken: Callable[[Tensor], Tensor]
) -> None:
    torch.save(STATE | {"first.weight": broken(STATE["first.weight"])}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"1 tensors without a finite floating-point .*: first\.weight\n"):
        load_foreign(Small(), tmp_path / "weights.pth")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu])
def test_floating_point_numbers_of_eight_bits_are_weights_too(tmp_path: Path, dtype: torch.dtype) -> None:
    eight = STATE["first.weight"].abs().to(dtype)
    torch.save(STATE | {"first.weight": eight}, tmp_path / "weights.pth")
    load_foreign(model := Small(), tmp_path / "weights.pth")
    assert torch.equal(model.state_dict()["first.weight"], eight.float())
    eight.view(torch.uint8)[0, 0] = 0xFF  # NaN in each
    torch.save(STATE | {"first.weight": eight}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"1 tensors without a finite floating-point .*: first\.weight\n"):
        load_foreign(Small(), tmp_path / "weights.pth")


def test_tied_tensors_are_wanted_once_and_must_be_one_in_the_file(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    weight = torch.randn(5, 3)
    for held in ({"embed.weight": weight}, {"head.weight": weight}, {"embed.weight": weight, "head.weight": weight}):
        torch.save(held, tmp_path / "weights.bin")
        load_foreign(model, tmp_path / "weights.bin")
        assert torch.equal(model["embed"].weight, weight)
    torch.save({"embed.weight": weight, "head.weight": weight + 1}, tmp_path / "weights.bin")
    with pytest.raises(CheckpointError, match=r"hold two there: embed\.weight and head\.weight"):
        load_foreign(model, tmp_path / "weights.bin")


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_something_is_refused_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": STATE, "more": Hostile()}, "hostile.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=r"^hostile\.pth: .*it asks for posix\.system\), and nothing in it is run"
    ):
        read_foreign(Path("hostile.pth"))
    Path("plain.pth").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(CheckpointError, match=r"^plain\.pth: .*nothing in it is run"):
        read_foreign(Path("plain.pth"))
    torch.save(Small(), "module.pth")
    with pytest.raises(CheckpointError, match=r"it asks for [\w.]*Small\)"):
        read_foreign(Path("module.pth"))
    assert not Path("ran").exists()


def test_a_file_that_is_not_there_damaged_or_without_tensors_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(CheckpointError, match=r"weights\.pth: cannot be read \(No such file"):
        read_foreign(path)
    with pytest.raises(CheckpointError, match=r"holds no weights under the names model\.safetensors\.index\.json"):
        read_foreign(tmp_path)
    torch.save({"epoch": 3, "note": "x"}, path)
    with pytest.raises(CheckpointError, match="holds no named tensors, but epoch, note"):
        read_foreign(path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(CheckpointError, match="holds no named tensors, but list"):
        read_foreign(path)
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(CheckpointError, match=r"weights\.pth: is damaged"):
        read_foreign(path)
    (tmp_path / "weights.safetensors").write_bytes(b"\x10")
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: cannot be read"):
        read_foreign(tmp_path / "weights.safetensors")
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(CheckpointError, match="it is a named pipe"):
        read_foreign(tmp_path / "pipe.pth")
