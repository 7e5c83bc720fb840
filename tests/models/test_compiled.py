"""torch.compile: the blocks of every workload are graphs, and train as they do without.

tests/models/fluid/test_network.py does it for the network of fluid, whose shape only data say.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from trunkline.engine.backends.model_options import apply_options, blocks
from trunkline.engine.config.run_config import load_config
from trunkline.engine.errors import ConfigError
from trunkline.models.registry import config_sections, weights_task

CONFIGS = Path(__file__).parents[2] / "configs"
TOKENS = ["data.encoding=rgb", "model.loss=x", "model.prior=none", "model.noise=linear"]


def _trained(name: str, settings: list[str]) -> list[Tensor]:
    """The loss of the largest sample, and the gradients of it."""
    config = load_config(CONFIGS / f"{name}.json", sections=config_sections, settings=settings)
    task = weights_task(config)
    torch.manual_seed(0)
    model = apply_options(task.build_model(), config.training)
    assert blocks(model)
    batch = task.collate([task.largest_sample()])
    batch |= {"valid": torch.ones(1, dtype=torch.bool), "draw": torch.zeros(1, dtype=torch.int64)}
    torch.manual_seed(1)
    loss = task.loss(model, batch)["loss"]
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("causal_lm/demo", []),
        *(
            pytest.param(name, settings, marks=pytest.mark.slow)
            for name, settings in (
                ("image_classification/demo", []), ("seq2seq/demo", ["model.attention=sdpa"]),
                ("token_image/demo", TOKENS),
            )
        ),
    ],
)  # fmt: skip
def test_compiled_blocks_train_as_they_do_without(name: str, settings: list[str]) -> None:
    plain, compiled = (_trained(name, [*settings, f"training.compile={how}"]) for how in ("false", "eager"))
    for one, other in zip(plain, compiled, strict=True):
        torch.testing.assert_close(one, other)


def test_an_attention_that_has_no_graph_is_named_with_the_one_that_has() -> None:
    with pytest.raises(
        ConfigError, match=r"^training.compile: torch.compile has no graph .* set model.attention=sdpa$"
    ):
        _trained("seq2seq/demo", ["training.compile=eager"])
