"""BatchNorm by groups: torch's own on each group, and one step on every layout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ResNetConfig, ResNetForImageClassification

from tests.distributed import run_distributed_test
from tests.models.image_classification.tiny_pictures import losses, picture_config, picture_folder, read, train
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.data.order import FILLER, GlobalBatches
from trunkline.engine.ranks.distributed import start
from trunkline.engine.task import Batch, Sums
from trunkline.engine.trainer import Trainer
from trunkline.models.image_classification.config import ImageModel
from trunkline.models.image_classification.normalization import GroupedBatchNorm, normalized
from trunkline.models.image_classification.task import ImageTask

LAYOUTS = [("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3), ("fsdp", 3)]
GROUP = 4
"""Of 45 pictures by 16: an epoch's last batch is 13 of them, and its last group a single one."""


def tiny_resnet(**settings: Any) -> ResNetForImageClassification:
    """transformers' own, with statistics and norms that differ from a new one's."""
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3, **settings
    )
    network = ResNetForImageClassification(config)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.running_var):
                torch.nn.init.uniform_(tensor, 0.5, 1.5)  # type: ignore[arg-type]
            torch.nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
    return network


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_folder(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def network_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resnet")
    tiny_resnet().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("shape", "group"),
    [((8, 3, 4, 4), 8), ((8, 3, 4, 4), 4), ((9, 3, 2, 2), 4), ((9, 3), 4), ((1, 3), 4), ((5, 3, 1, 1), 4)],
)  # fmt: skip
def test_each_group_is_normalised_by_torchs_own_norm_and_the_running_statistics_are_their_mean(
    shape: tuple[int, ...], group: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    plain = kind(3, momentum=0.3).double()
    plain.weight.data.uniform_(0.5, 2, generator=generator)
    plain.bias.data.normal_(generator=generator)
    plain.running_mean.normal_(generator=generator)  # type: ignore[union-attr]
    norm = GroupedBatchNorm(copy.deepcopy(plain), group)
    assert norm.state_dict().keys() == plain.state_dict().keys()

    axes = [0, *range(2, len(shape))]
    out, mean, variance = [], 0.0, 0.0
    view = (1, 3, *[1] * (len(shape) - 2))
    for part in x.split(group):
        count = part.numel() // 3
        middle, spread = part.mean(axes), part.var(axes, correction=0)
        out.append((part - middle.view(view)) * (spread + plain.eps).rsqrt().view(view))
        mean = mean + middle.detach() * len(part) / len(x)
        variance = variance + spread.detach() * count / max(count - 1, 1) * len(part) / len(x)
    wanted = torch.cat(out) * plain.weight.view(view) + plain.bias.view(view)
    upstream = torch.randn(shape, generator=generator, dtype=torch.float64)
    found = norm(x)
    torch.testing.assert_close(found, wanted)
    ours = torch.autograd.grad(found, [x, norm.weight, norm.bias], upstream)
    theirs = torch.autograd.grad(wanted, [x, plain.weight, plain.bias], upstream)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert plain.running_mean is not None
    assert plain.running_var is not None
    torch.testing.assert_close(norm.running_mean, 0.7 * plain.running_mean + 0.3 * mean)
    torch.testing.assert_close(norm.running_var, 0.7 * plain.running_var + 0.3 * variance)
    assert norm.num_batches_tracked == 1
    assert torch.equal(norm.eval()(x), F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias))


def test_a_norm_that_is_not_trained_keeps_its_statistics_and_normalises_by_them() -> None:
    plain = nn.BatchNorm2d(3)
    plain.running_mean.fill_(2.0)  # type: ignore[union-attr]
    norm = GroupedBatchNorm(plain, 4).requires_grad_(False)
    before = copy.deepcopy(norm.state_dict())
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(norm.train()(x), (x - 2.0) / (1 + norm.eps) ** 0.5) or torch.allclose(norm(x), plain.eval()(x))
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


def test_statistics_are_in_fp32_where_weights_and_images_are_in_bf16() -> None:
    norm = GroupedBatchNorm(nn.BatchNorm2d(3), 2)
    norm.weight.data, norm.bias.data = norm.weight.data.bfloat16(), norm.bias.data.bfloat16()
    x = torch.randn(6, 3, 4, 4)
    out = norm(x.bfloat16())
    assert (out.dtype, norm.running_var.dtype) == (torch.bfloat16, torch.float32)  # type: ignore[union-attr]
    torch.testing.assert_close(out.float(), GroupedBatchNorm(nn.BatchNorm2d(3), 2)(x), rtol=0.02, atol=0.03)


def test_group_norm_takes_32_groups_or_the_largest_divisor() -> None:
    network = nn.Sequential(nn.BatchNorm2d(64), nn.BatchNorm2d(48), nn.BatchNorm2d(7))
    model = ImageModel(arch="resnet18", normalization="group")
    found = [(norm.num_groups, norm.num_channels) for norm in normalized(network, model)]  # type: ignore[union-attr]
    assert found == [(32, 64), (24, 48), (7, 7)]


def tiny_model(network_folder: Path, **model: Any) -> dict[str, Any]:
    return {"path": str(network_folder), "batch_norm_group": GROUP} | model


def plain_loop(
    config: RunConfig, images: Path, forward: Callable[[nn.Module, Tensor], Tensor], network: nn.Module
) -> tuple[list[float], dict[str, Tensor]]:
    """The loss of each step, and the state at the end, by torch alone. `forward` gives the logits of a global batch."""
    x, y = read(images, "train")
    network.train()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    params = config.deepspeed.optimizer.params
    optimizer = torch.optim.SGD(parameters, lr=params["lr"], momentum=params["momentum"])
    batches, found = GlobalBatches(len(x), 16, config.training.seed), []
    for step in range(int(config.training.steps or 0)):
        chosen = batches.samples(step)
        chosen = torch.from_numpy(chosen[chosen != FILLER])
        loss = F.cross_entropy(forward(network, x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        found.append(loss.item())
    return found, dict(network.state_dict())


def by_groups(network: nn.Module, x: Tensor) -> Tensor:
    """Every group passes through a network of torch's own BatchNorm alone, and the statistics become their mean."""
    after = {name: torch.zeros_like(buffer, dtype=torch.float64) for name, buffer in network.named_buffers()}
    logits = []
    for part in x.split(GROUP):
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        logits.append(torch.func.functional_call(network, buffers, (part,)).logits)
        for name, buffer in buffers.items():
            after[name] += buffer.double() * len(part) / len(x)
    for name, buffer in network.named_buffers():
        buffer.copy_(after[name] if buffer.is_floating_point() else after[name].round())
    return torch.cat(logits)


def assert_close(run: Path, wanted: tuple[list[float], dict[str, Tensor]]) -> None:
    assert losses(run) == pytest.approx(wanted[0], rel=1e-5)
    found = load_file(run / "final" / "model.safetensors")
    assert found.keys() == wanted[1].keys()
    for name, tensor in wanted[1].items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda said, n=name: f"{n}: {said}")


def grouped_config(
    folder: Path, images: Path, network_folder: Path, micro: int | str, stage: int = 0, **training: Any
) -> RunConfig:
    return picture_config(
        folder, images, tiny_model(network_folder), training={"steps": 6} | training,
        deepspeed={"train_micro_batch_size_per_gpu": micro, "zero_optimization": {"stage": stage}},
    )  # fmt: skip


@pytest.mark.parametrize(("micro", "recomputed"), [(16, False), (8, True), (4, False)])
def test_a_step_does_not_depend_on_the_micro_batch(
    tmp_path: Path, images: Path, network_folder: Path, micro: int, recomputed: bool
) -> None:
    config = grouped_config(tmp_path, images, network_folder, micro, activation_checkpointing=recomputed)
    train(tmp_path / "run", config)
    assert_close(tmp_path / "run", plain_loop(config, images, by_groups, tiny_resnet()))


class Hungry(ImageTask):
    """On a device that holds 4 images."""

    def loss(self, model: nn.Module, batch: Batch) -> Sums:
        sums = super().loss(model, batch)
        if len(batch["label"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sums


def test_a_step_is_the_same_after_memory_ran_out_in_the_middle_of_it(
    tmp_path: Path, images: Path, network_folder: Path
) -> None:
    config = grouped_config(tmp_path, images, network_folder, 16)
    trainer = Trainer(Hungry(config.data, config.model), config, start(), tmp_path / "run")
    trainer.run()
    assert trainer.micro.sizes.micro_batch_size == 4
    assert_close(tmp_path / "run", plain_loop(config, images, by_groups, tiny_resnet()))


EMA = {"decay": 0.9, "warmup": False, "use": ["final"]}


def train_on_a_rank(
    rank: int, world_size: int, folder: Path, images: Path, network_folder: Path
) -> list[dict[str, Tensor]]:
    found = []
    for place, (backend, stage) in enumerate(LAYOUTS):
        micro = (8, 4)[place % 2]
        config = grouped_config(folder / f"of-{rank}", images, network_folder, micro, stage)
        trainer = train(folder / f"{backend}-{stage}", config, backend)
        found.append({name: buffer.clone() for name, buffer in trainer.backend.module.named_buffers()})
    config = grouped_config(folder / f"of-{rank}", images, network_folder, 8, 2, ema=EMA, save_every=4)
    train(folder / "averaged", config)
    train(folder / "resumed", config, resume=str(folder / "averaged" / "checkpoints" / "step-00000004"))
    return found


@pytest.mark.distributed
def test_a_step_does_not_depend_on_ranks_and_a_resumed_run_is_the_unbroken_one_bit_for_bit(
    tmp_path: Path, images: Path, network_folder: Path
) -> None:
    config = grouped_config(tmp_path, images, network_folder, 16, ema=EMA)
    wanted = plain_loop(config, images, by_groups, tiny_resnet())
    found = run_distributed_test(train_on_a_rank, 2, tmp_path, images, network_folder, backend=None)
    for place, (backend, stage) in enumerate(LAYOUTS):
        assert_close(tmp_path / f"{backend}-{stage}", wanted)
        mine, others = found[0][place], found[1][place]
        assert all(torch.equal(mine[name], others[name]) for name in mine)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "averaged")[4:]
    whole, resumed = (load_file(tmp_path / run / "final" / "model.safetensors") for run in ("averaged", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for backend, micro in (("fsdp", 16), ("deepspeed", 4)):  # any to any: from two ranks of ZeRO 2 to one of another
        config = grouped_config(tmp_path, images, network_folder, micro, 3, ema=EMA)
        run = tmp_path / f"on-{backend}"
        train(run, config, backend, resume=str(tmp_path / "averaged" / "checkpoints" / "step-00000004"))
        assert losses(run) == pytest.approx(wanted[0][4:], rel=1e-5)
        for name, tensor in load_file(run / "final" / "model.safetensors").items():
            torch.testing.assert_close(tensor, whole[name], rtol=1e-4, atol=1e-5)
