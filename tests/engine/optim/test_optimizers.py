from typing import Any

import pytest
import torch

from trunkline.engine.config.deepspeed_section import Optimizer
from trunkline.engine.config.strict import validated
from trunkline.engine.errors import ConfigError
from trunkline.engine.optim.optimizers import build_optimizer


def build(kind: str, **params: object) -> torch.optim.Optimizer:
    return build_optimizer([torch.nn.Parameter(torch.ones(2))], section(kind, **params))


def section(kind: str, **params: Any) -> Optimizer:
    return validated(Optimizer, {"type": kind, "params": {"lr": 0.1} | params}, "deepspeed.optimizer", "run.json")


@pytest.mark.parametrize(
    ("kind", "params", "expected"),
    [
        ("AdamW", {"betas": [0.8, 0.9]}, torch.optim.AdamW),
        ("Adam", {}, torch.optim.AdamW),  # DeepSpeed's meaning of "Adam"
        ("Adam", {"adam_w_mode": False, "torch_adam": True}, torch.optim.Adam),
        ("AdamW", {"adam_w_mode": True}, torch.optim.AdamW),
        ("SGD", {"momentum": 0.9}, torch.optim.SGD),
        ("RMSprop", {}, torch.optim.RMSprop),
        ("Adafactor", {}, torch.optim.Adafactor),
    ],
)
def test_names_give_the_classes_and_settings_reach_them(kind: str, params: dict, expected: type) -> None:
    optimizer = build(kind, **params)
    assert type(optimizer) is expected
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.1
    for key, value in params.items():
        if key in group:
            assert group[key] == (tuple(value) if isinstance(value, list) else value)


def test_frozen_parameters_are_left_out() -> None:
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = build_optimizer([frozen, torch.nn.Parameter(torch.ones(3))], section("SGD", lr=1.0))
    assert [parameter.numel() for parameter in optimizer.param_groups[0]["params"]] == [3]


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("AdmaW", {}, "did you mean 'AdamW'"),
        ("AdamW", {"weigth_decay": 0.1}, "did you mean 'weight_decay'"),
        ("AdamW", {"adam_w_mode": False}, "optimizer.params.adam_w_mode: AdamW always decouples"),
        ("Adam", {"bias_correction": False}, "optimizer.params.bias_correction: false is not supported"),
        ("SGD", {"nesterov": True}, "SGD does not accept .*Nesterov momentum requires a momentum"),
        ("apex.FusedAdma", {}, "did you mean 'apex.FusedAdam'"),
        ("apex.FusedAdam", {}, "apex is not installed"),
    ],
)
def test_what_cannot_be_built_is_a_named_error(kind: str, params: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(kind, **params)
