from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.models.token_image.test_loss import made
from trunkline.models.token_image.config import TokenImageModel
from trunkline.models.token_image.encodings import Encoding
from trunkline.models.token_image.flops import forward_flops, training_flops

STRIPS = {"patch": [1, 4], "block": "official", "stem": 3, "condition": False}
LOGITS = {"loss": "cross_entropy", "self_conditioning": True}


@pytest.mark.parametrize("kind", ["texts", "dialogues"])
@pytest.mark.parametrize(
    "model", [{}, {"block": "official"}, STRIPS, LOGITS, STRIPS | LOGITS | {"prior": "unigram"}],
    ids=["original", "official", "strips", "logits", "learnable"],
)  # fmt: skip
def test_operations_are_those_that_torch_counts(kind: str, model: dict, request: pytest.FixtureRequest) -> None:
    """torch does not count its attention on CPUs: 4 d N^2 a block and forward pass, and twice that backward."""
    if kind == "dialogues" and not model.get("condition", True):
        model = model | {"condition": True}
    store: Path = request.getfixturevalue(kind)
    task, batch = made(store, **model)
    network = task.build_model()
    with FlopCounterMode(display=False) as counter:
        task.loss(network, batch)["loss"].backward()
    patches = 256 // torch.Size(task.model.shape.patch).numel()
    tokens, passes = patches + 256 * task.model.condition, 3 + task.model.self_conditioning
    attention = passes * 2 * 4 * 32 * tokens**2
    assert counter.get_total_flops() / len(batch["valid"]) + attention == pytest.approx(task.flops_per_sample())


@pytest.mark.parametrize(("size", "forward"), [(64, 125.7e9), (256, 1684.5e9)])
def test_the_preset_b_4_takes_what_is_said_of_it(size: int, forward: float) -> None:
    model, encoding = TokenImageModel(preset="B/4"), Encoding("rgb", 4096)
    assert forward_flops(model, size, encoding, conditioned=False) == pytest.approx(forward, rel=1e-4)
    assert training_flops(model, size, encoding, conditioned=False) == pytest.approx(3 * forward, rel=2e-3)


def test_the_official_b_4_without_places_for_a_condition_takes_what_is_said_of_it() -> None:
    model, encoding = TokenImageModel(preset="B/4", block="official", condition=False), Encoding("rgb", 4096)
    assert forward_flops(model, 64, encoding, conditioned=False) == pytest.approx(46.025e9, rel=1e-4)
    assert training_flops(model, 64, encoding, conditioned=False) == pytest.approx(137.97e9, rel=1e-4)
