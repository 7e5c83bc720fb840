from __future__ import annotations

from typing import Any

import pytest
import torch

from trunkline.engine.config.strict import validated
from trunkline.engine.errors import ConfigError
from trunkline.models.causal_lm.build import hf_config_of, make_network
from trunkline.models.causal_lm.config import PRESETS, CausalLMModel


def model(**keys: Any) -> CausalLMModel:
    return validated(CausalLMModel, {"objective": {"type": "pretrain"}} | keys, "model", "run.json")


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("tiny", 2_789_504), ("small", 29_506_944), ("medium", 58_491_392), ("large", 298_304_256)],
)
def test_a_preset_has_exactly_its_parameters(preset: str, parameters: int) -> None:
    described = model(preset=preset)
    with torch.device("meta"):
        network = make_network(described, hf_config_of(described, 512))
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert set(PRESETS) == {"tiny", "small", "medium", "large"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "run.json: model: give path, a preset"),
        ({"preset": "tiny", "path": "x"}, "give one of path, preset or all widths; path, preset are set"),
        ({"preset": "tiny", "hidden_size": 64}, "preset, hidden_size are set"),
        ({"preset": "tiny", "objective": {"type": "dpo"}}, "dpo starts from a trained model: set model.path"),
        ({"path": "x", "objective": {"type": "dpo", "betta": 1}}, "objective.betta: unknown key; did you mean .beta."),
        ({"path": "x", "objective": {"type": "sft", "beta": 1}}, "model.objective.beta: unknown key; known: type"),
        ({"path": "x", "objective": {"type": "dpo", "beta": 0}}, "objective.beta: input should be greater than 0"),
        ({"path": "x", "objective": {"type": "rlhf"}}, "expected tags: 'pretrain', 'sft', 'dpo'"),
        (
            {"vocab_size": 9, "hidden_size": 64, "num_layers": 1, "num_heads": 3, "num_kv_heads": 1,
             "intermediate_size": 9},
            "hidden_size must be an even multiple of num_heads",
        ),
        (
            {"vocab_size": 9, "hidden_size": 64, "num_layers": 1, "num_heads": 4, "num_kv_heads": 3,
             "intermediate_size": 9},
            "num_heads must be a multiple of num_kv_heads",
        ),
    ],
)  # fmt: skip
def test_a_mistake_in_the_model_section_is_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model(**keys)


def test_every_metric_of_the_model_s_own_has_a_direction() -> None:
    from trunkline.models.causal_lm.dpo import REWARDS
    from trunkline.models.causal_lm.task import DIRECTIONS

    assert {"loss", "perplexity", "prefers_chosen", *REWARDS} == set(DIRECTIONS)
    assert [name for name, direction in DIRECTIONS.items() if direction == "max"] == [
        "rewards/chosen", "rewards/margins", "rewards/accuracies", "prefers_chosen",
    ]  # fmt: skip
