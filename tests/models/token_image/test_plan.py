"""What --plan says of memory, for every form of the network."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.token_image.runs import run_config
from tests.models.token_image.test_loss import made
from trunkline.engine.planned_memory import activation_bytes
from trunkline.models.token_image.information import LEAST, MOST, POINTS, Curve

LEARNABLE = {
    "patch": [1, 4], "block": "official", "stem": 3, "condition": False, "noise": "information", "prior": "unigram",
    "loss": "cross_entropy", "self_conditioning": True,
}  # fmt: skip


@pytest.mark.parametrize("model", [{}, {"self_conditioning": True, "loss": "v"}, LEARNABLE])
def test_the_plan_names_the_bytes_that_are_kept(model: dict[str, Any], texts: Path, tmp_path: Path) -> None:
    task, batch = made(texts, count=2, **model)
    if task.model.noise == "information":  # a made-up one: the true one takes seconds
        shares = torch.linspace(0, 1, POINTS)
        task.curve = Curve(torch.logspace(math.log10(LEAST), math.log10(MOST), POINTS), shares)
    network = task.build_model()
    own = {tensor.untyped_storage()._cdata for tensor in [*network.parameters(), *network.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        task.loss(network, batch)["loss"].backward()
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert activation_bytes(task, network, run_config(tmp_path, texts), 2) == pytest.approx(found, rel=0.02)
