"""The networks: sizes, fifty steps beside a plain loop and transformers' Trainer, files that transformers opens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, TrainingArguments, ViTConfig, ViTForImageClassification
from transformers import Trainer as TheirTrainer

from tests.models.image_classification.test_normalization import tiny_resnet
from tests.models.image_classification.tiny_pictures import (
    CLASSES,
    losses,
    picture_config,
    picture_folder,
    read,
    train,
)
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.data.order import FILLER, GlobalBatches
from trunkline.engine.data.randomness import seed_torch
from trunkline.engine.errors import ConfigError
from trunkline.engine.plan import make_plan
from trunkline.models.image_classification.architectures import ARCHITECTURES, architectures
from trunkline.models.image_classification.config import ImageModel
from trunkline.models.image_classification.network import check_size, make_network, trained_network
from trunkline.models.registry import make_task


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def resnet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resnet")
    tiny_resnet().save_pretrained(folder)
    return folder


WANTED = {
    "resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032, "resnet101": 44_549_160,
    "resnet152": 60_192_808, "convnext_tiny": 28_589_128, "vit_small_patch16": 22_050_664,
    "vit_base_patch16": 86_567_656, "swin_tiny": 28_288_354, "efficientnet_b0": 5_288_548, "resnet_tiny": 828_168,
}  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_network_has_the_parameters_of_its_paper(arch: str) -> None:
    with torch.device("meta"):
        network = make_network(ImageModel(arch=arch), 1000, 224)
    assert sum(parameter.numel() for parameter in network.parameters()) == architectures()[arch] == WANTED[arch]


def test_a_series_is_listed_by_its_name_or_a_part_of_one() -> None:
    assert list(architectures("resnet")) == [name for name in ARCHITECTURES if name.startswith("resnet")]
    assert architectures("base") == {"vit_base_patch16": 86_567_656}


def by_group_norm(network: Any) -> Any:
    """GroupNorm of 32 channels or more in place of each BatchNorm, written out."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.GroupNorm(32, child.num_features))
    return network


def with_frozen_norms(network: Any) -> Any:
    """BatchNorms that stay in eval mode, whatever a loop calls."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign, misc]
    return network


def optimizer_of(config: RunConfig, network: Any) -> torch.optim.Optimizer:
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trained, **config.deepspeed.optimizer.params)


def losses_of_a_plain_loop(config: RunConfig, images: Path, network: Any) -> list[float]:
    (x, y), found = read(images, "train"), []
    optimizer = optimizer_of(config, network)
    batches = GlobalBatches(len(x), 8, config.training.seed)
    network.train()
    for step in range(50):
        chosen = torch.from_numpy(batches.samples(step)[batches.samples(step) != FILLER])
        loss = F.cross_entropy(network(x[chosen]).logits, y[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        found.append(loss.item())
    return found


def losses_of_transformers_trainer(config: RunConfig, images: Path, network: Any, folder: Path) -> list[float]:
    x, y = read(images, "train")
    batches = GlobalBatches(len(x), 8, config.training.seed)
    order = np.concatenate([batches.samples(step) for step in range(50)]).tolist()
    recorded: list[float] = []

    class InOrder(TheirTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

        def training_step(self, *arguments: Any, **keys: Any) -> Tensor:
            loss = super().training_step(*arguments, **keys)
            recorded.append(float(loss))
            return loss

    def collate(places: list[int]) -> dict[str, Tensor]:
        chosen = torch.tensor(places)
        real = chosen.clamp(min=0)
        return {"pixel_values": x[real], "labels": y[real].masked_fill(chosen == FILLER, -100)}

    optimizer = optimizer_of(config, network)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=50, per_device_train_batch_size=8, max_grad_norm=1.0, report_to=[],
        remove_unused_columns=False, use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    InOrder(
        model=network, args=arguments, train_dataset=order, data_collator=collate, optimizers=(optimizer, schedule)
    ).train()
    return recorded


@pytest.mark.parametrize(("normalization", "size", "rate"), [("group", 32, 1e-4), ("frozen", 16, 0.002)])
def test_fifty_steps_have_the_losses_of_a_plain_loop_and_of_transformers_trainer(
    tmp_path: Path, resnet_folder: Path, normalization: str, size: int, rate: float
) -> None:
    images = picture_folder(tmp_path / "pictures", size=size)
    model = {"path": str(resnet_folder)} if normalization == "frozen" else {"arch": "resnet_tiny"}
    config = picture_config(
        tmp_path, images, model | {"normalization": normalization}, training={"steps": 50}, data={"img_size": size},
        deepspeed={
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 4,
            # a GroupNorm of few values lifts rounding by up to 300 a layer: at higher rates no two loops agree for long
            "optimizer": {"params": {"lr": rate, "momentum": 0.9}},
        },
    )  # fmt: skip
    trainer = train(tmp_path / "run", config)
    found = losses(tmp_path / "run")

    def theirs() -> Any:
        if normalization == "frozen":
            return with_frozen_norms(tiny_resnet())
        seed_torch(config.training.seed, 0)
        begin = make_task(config).build_model()
        network = by_group_norm(AutoModelForImageClassification.from_config(begin.config))
        network.load_state_dict(begin.state_dict())
        return network

    assert found == pytest.approx(losses_of_a_plain_loop(config, images, theirs()), rel=1e-5)
    assert found == pytest.approx(losses_of_transformers_trainer(config, images, theirs(), tmp_path / "t"), rel=1e-5)
    assert min(found) < 0.95 * found[0]
    if normalization == "frozen":
        begin_state, norms = (
            tiny_resnet().state_dict(),
            [n for n, m in tiny_resnet().named_modules() if "Norm" in type(m).__name__],
        )
        for name, tensor in trainer.backend.module.state_dict().items():
            assert torch.equal(tensor, begin_state[name]) == (name.rpartition(".")[0] in norms), name


def logits_of_transformers(folder: Path, x: Tensor) -> Tensor:
    network = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        return network.eval()(x).logits


def test_best_opens_in_transformers_with_equal_logits_and_in_a_pipeline(
    tmp_path: Path, images: Path, resnet_folder: Path
) -> None:
    from transformers import pipeline

    config = picture_config(tmp_path, images, {"path": str(resnet_folder), "batch_norm_group": 16})
    network = train(tmp_path / "run", config).backend.module
    best, (x, _) = tmp_path / "run" / "best", read(images, "val")
    with torch.no_grad():
        wanted = network.eval()(pixel_values=x).logits
    assert torch.equal(logits_of_transformers(best, x), wanted)
    assert torch.equal(trained_network(best, config.model, 3, 16).eval()(pixel_values=x).logits, wanted)
    assert load_file(best / "model.safetensors").keys() == load_file(resnet_folder / "model.safetensors").keys()
    written = json.loads((best / "config.json").read_text())
    assert written["id2label"] == {"0": "bright", "1": "dark", "2": "green"}
    assert written["architectures"] == ["ResNetForImageClassification"]
    classify = pipeline("image-classification", model=str(best), device="cpu")
    found = classify(Image.open(sorted((images / "val" / CLASSES[0]).iterdir())[0]), top_k=3)
    probabilities = dict(zip(CLASSES, wanted[0].softmax(0).tolist(), strict=True))
    assert {each["label"]: each["score"] for each in found} == pytest.approx(probabilities, rel=1e-4)


def test_tensors_have_the_names_that_transformers_gives_them_in_files(tmp_path: Path, images: Path) -> None:
    shape = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
        num_labels=3,
    )  # fmt: skip
    ViTForImageClassification(shape).save_pretrained(tmp_path / "vit")
    config = picture_config(tmp_path, images, {"path": str(tmp_path / "vit")}, training={"steps": 2})
    network = train(tmp_path / "run", config, "fsdp").backend.module
    best, (x, _) = tmp_path / "run" / "best", read(images, "val")
    assert load_file(best / "model.safetensors").keys() == load_file(tmp_path / "vit" / "model.safetensors").keys()
    with torch.no_grad():
        wanted = network.eval()(pixel_values=x).logits
        assert torch.equal(trained_network(best, config.model, 3, 16).eval()(pixel_values=x).logits, wanted)
    torch.testing.assert_close(logits_of_transformers(best, x), wanted)


def test_a_network_of_group_norms_names_no_class_of_transformers(tmp_path: Path, images: Path) -> None:
    model = {"arch": "resnet_tiny", "normalization": "group"}
    config = picture_config(tmp_path, images, model, training={"steps": 1})
    network, best = train(tmp_path / "run", config).backend.module, tmp_path / "run" / "best"
    with pytest.raises(ValueError, match="model_type"):
        AutoModelForImageClassification.from_pretrained(best)
    x, _ = read(images, "val")
    with torch.no_grad():
        wanted = network.eval()(pixel_values=x).logits
        assert torch.equal(trained_network(best, config.model, 3, 16).eval()(pixel_values=x).logits, wanted)


def message(make: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as raised:
        make()
    return str(raised.value)


def test_what_has_no_effect_or_no_sense_is_an_error(tmp_path: Path, images: Path, resnet_folder: Path) -> None:
    def of(**model: Any) -> str:
        return message(lambda: make_task(picture_config(tmp_path, images, model)))

    assert "model.arch: no such network; did you mean 'resnet18'?" in of(arch="resnet_18")
    assert "give either 'arch'" in of()
    assert "model.normalization: group has no effect on ViTForImageClassification, which has no BatchNorm" in of(
        arch="vit_small_patch16", normalization="group"
    )
    assert "model.batch_norm_group: 8 has no effect on ConvNext" in of(arch="convnext_tiny", batch_norm_group=8)
    assert "batch_norm_group 8 has no effect with normalization 'frozen'" in of(
        arch="resnet18", normalization="frozen", batch_norm_group=8
    )
    assert "'pretrained' has no effect beside 'path'" in of(path=str(resnet_folder), pretrained="x.pth")
    assert "'group' has no use for the weights of 'path'" in of(path=str(resnet_folder), normalization="group")
    with torch.device("meta"):
        network = make_network(ImageModel(arch="vit_small_patch16"), 3, 224)
    assert "data.img_size: 192: vit_small_patch16 cannot see images of that size: ValueError: Input" in message(
        lambda: check_size(network, 192, ImageModel(arch="vit_small_patch16"))
    )


def test_a_group_bounds_the_micro_batch(tmp_path: Path, images: Path) -> None:
    def plan(ranks: int, **deepspeed: Any) -> dict[str, Any]:
        config = picture_config(
            tmp_path, images, {"arch": "resnet_tiny", "batch_norm_group": 8}, deepspeed=deepspeed
        )  # fmt: skip
        task = make_task(config)
        with torch.device("meta"):
            return make_plan(task, config, ranks, task.build_model())

    assert plan(2)["micro_batch_size"] == 8
    assert plan(1, train_batch_size=20)["micro_batch_size"] == 20  # whole groups and a short one
    said = message(lambda: plan(4))
    assert said.endswith(
        "deepspeed.train_micro_batch_size_per_gpu: 4 samples on each of 4 ranks are no multiple of the 8 that belong "
        "together (model.batch_norm_group): use a multiple of 32 for deepspeed.train_batch_size (16), or a divisor of "
        "4 for model.batch_norm_group"
    )
    assert 'use a multiple of 8, or "auto", for it' in message(lambda: plan(1, train_micro_batch_size_per_gpu=4))


def test_the_body_is_frozen_or_trained_at_a_lower_rate_by_rules(
    tmp_path: Path, images: Path, resnet_folder: Path
) -> None:
    model = {"path": str(resnet_folder), "batch_norm_group": 16}
    begin = load_file(resnet_folder / "model.safetensors")
    rules: list[dict[str, Any]] = [
        {"names": ["resnet.embedder.*"], "frozen": True},
        {"names": ["resnet.*"], "lr_scale": 0.1},
    ]
    config = picture_config(tmp_path, images, model, training={"steps": 3, "parameters": rules})
    train(tmp_path / "run", config)
    found = load_file(tmp_path / "run" / "final" / "model.safetensors")
    for name, tensor in found.items():
        assert torch.equal(tensor, begin[name]) == name.startswith("resnet.embedder."), name  # its statistics too
