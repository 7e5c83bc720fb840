"""Activations are counted as the device keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.plan import make_plan
from trunkline.engine.planned_memory import activation_bytes
from trunkline.engine.task import Batch, Sums

WIDTH, HIDDEN, LONGEST, ROWS = 6, 8, 5, 4


class Network(nn.Module):
    """Two linear layers, and between them a norm or nothing."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.enter, self.norm, self.leave = nn.Linear(WIDTH, HIDDEN), norm(HIDDEN), nn.Linear(HIDDEN, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.leave(self.norm(self.enter(x.to(self.enter.weight.dtype)))).float()


class Mixed(nn.RMSNorm):
    """Its weight is in fp32, whatever the input is in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


class Weightless(nn.RMSNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width, elementwise_affine=False)


class Normed(TinyTask):
    norm: type[nn.Module] = nn.RMSNorm

    def build_model(self) -> nn.Module:
        return Network(self.norm)

    def loss(self, model: nn.Module, batch: Batch) -> Sums:
        return {"loss": model(batch["x"]).square().sum()}


class NormedInTwoDtypes(Normed):
    norm = Mixed


class NormedWithoutWeight(Normed):
    norm = Weightless


class Bare(Normed):
    norm = nn.Identity


@pytest.mark.parametrize(
    ("device", "bf16", "task_class", "gpu"),
    [
        ("cpu", False, Normed, False),
        ("cpu", True, Normed, False),
        ("cpu", True, NormedInTwoDtypes, True),  # a chain of operators everywhere
        pytest.param("cuda", False, Normed, True, marks=pytest.mark.gpu),
        pytest.param("cuda", True, Normed, True, marks=pytest.mark.gpu),
    ],
)
def test_the_bytes_of_a_norm_are_those_that_autograd_keeps(
    device: str, bf16: bool, task_class: type[Normed], gpu: bool, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, deepspeed={"bf16": {"enabled": bf16}})
    task = task_class(config.data, config.model)
    model = task.build_model().to(device, torch.bfloat16 if bf16 else torch.float32)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = task.collate([task.dataset("train")[0]] * ROWS)["x"].to(device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = task.loss(model, {"x": x})["loss"]
    assert loss.requires_grad
    more = 0 if device == "cpu" or bf16 else 4 * ROWS * LONGEST  # LayerNorm's mean
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert activation_bytes(task, task.build_model(), config, ROWS, gpu) == found + more


@pytest.mark.parametrize("task_class", [Normed, NormedWithoutWeight])
def test_in_16_bits_a_plan_counts_that_a_norm_keeps_its_input_and_4_bytes_a_row(
    task_class: type[Normed], tmp_path: Path
) -> None:
    sizes = {"train_batch_size": ROWS, "train_micro_batch_size_per_gpu": ROWS}
    config = tiny_config(tmp_path, deepspeed={"bf16": {"enabled": True}, **sizes})
    normed, bare = (
        make_plan(task, config, 1, task.build_model())["memory_bytes"]["activations"]
        for task in (task_class(config.data, config.model), Bare(config.data, config.model))
    )
    assert normed - bare == 2 * ROWS * LONGEST * HIDDEN + 4 * ROWS * LONGEST


class Vast(Normed):
    def collate(self, samples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Batch:
        return {"x": torch.stack([torch.zeros(1).expand(2**50)] * len(samples))}


def test_activations_of_a_micro_batch_that_torch_cannot_allocate_are_unknown(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    task = Vast(config.data, config.model)
    assert activation_bytes(task, task.build_model(), config, ROWS) is None
