from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from trunkline.engine.errors import ConfigError
from trunkline.models.token_image.config import TokenImageData, TokenImageModel
from trunkline.models.token_image.task import TokenImageTask

SMALL = {"patch": 4, "d_model": 32, "num_layers": 2, "num_heads": 2}
LEARNABLE = SMALL | {
    "patch": [1, 4], "block": "official", "stem": 3, "condition": False, "noise": "information", "prior": "unigram",
    "loss": "cross_entropy",
}  # fmt: skip


@pytest.mark.parametrize(("kind", "model"), [("texts", SMALL), ("dialogues", SMALL), ("texts", LEARNABLE)])
def test_every_parameter_gets_a_gradient(kind: str, model: dict, request: pytest.FixtureRequest) -> None:
    store = request.getfixturevalue(kind)
    data = TokenImageData(store=str(store), img_size=16, stride=64, encoding="bits")
    task = TokenImageTask(data, TokenImageModel(**model))
    torch.manual_seed(0)
    network = task.build_model()
    samples = task.dataset("train")
    batch = task.collate([samples[index] for index in range(4)])
    batch |= {"valid": torch.tensor([True, True, True, False]), "draw": torch.arange(4)}
    for name, value in task.loss(network, batch).items():
        assert torch.isfinite(value), name
        value.backward()
    gradients = {name: value.grad for name, value in network.named_parameters()}
    assert not [name for name, gradient in gradients.items() if gradient is None]
    if kind == "dialogues":
        assert all(gradient is not None and gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("widths", [{"d_model": 16}, {"d_model": 600}, {"num_heads": 16}])
def test_heads_that_attention_cannot_have_are_named(widths: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match=r"d_model must be .* with 16 to 256 channels a head; got \d+ with"):
        TokenImageModel(**SMALL | widths)


def test_dialogues_need_places_for_their_condition(dialogues: Path) -> None:
    model = TokenImageModel(**SMALL | {"condition": False})
    with pytest.raises(ConfigError, match=r"model\.condition"):
        TokenImageTask(TokenImageData(store=str(dialogues), img_size=16), model)
