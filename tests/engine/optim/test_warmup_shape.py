"""The schedule WarmupShape against its formula, written down independently."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.tiny import tiny_config
from trunkline.engine.config.deepspeed_section import Scheduler
from trunkline.engine.errors import ConfigError
from trunkline.engine.optim.schedules import build_scheduler, learning_rates

EPOCHS, STEPS = 100, 7


def rates(shape: str, steps: list[int], **params: Any) -> list[float]:
    given = {"shape": shape, "warmup": 3 * STEPS, "min_ratio": 0.1, "every": STEPS}
    section = Scheduler(type="WarmupShape", params=given | params)
    return list(learning_rates(section, 0.01, EPOCHS * STEPS, steps).values())


def test_the_rate_by_epochs_is_that_of_the_table() -> None:
    wanted = {0: 0.001, 1: 0.004, 2: 0.007, 3: 0.01, 50: 0.0057185, 99: 0.0010024}
    for place in (0, STEPS - 1):  # the same in the first and in the last step of an epoch
        got = rates("cosine", [epoch * STEPS + place for epoch in wanted])
        assert got == pytest.approx(list(wanted.values()), abs=5e-8)


def cosine(p: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * p))


SHARES: dict[str, Any] = {
    "cosine": cosine,
    "cosine_restarts": lambda p: cosine(3 * p - math.floor(3 * p + 1e-9)),
    "linear": lambda p: 1 - p,
    "constant": lambda p: 1.0,
    "polynomial": lambda p: (1 - p) ** 0.9,
    "step": lambda p: cosine(p / 0.7) if p < 0.7 else 0.0,
}


@pytest.mark.parametrize("shape", SHARES)
@pytest.mark.parametrize("every", [1, STEPS])
def test_each_shape_follows_its_formula_by_steps_and_by_epochs(shape: str, every: int) -> None:
    expected = []
    for step in range(EPOCHS * STEPS):
        epoch = step / STEPS if every == 1 else step // STEPS
        p = (epoch - 3) / (EPOCHS - 3)
        risen = 0.01 * (0.1 + 0.9 * epoch / 3)
        expected.append(risen if epoch < 3 else 0.001 + 0.009 * SHARES[shape](p))
    assert rates(shape, list(range(EPOCHS * STEPS)), every=every) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", SHARES)
def test_after_its_end_a_shape_stays_where_it_ended(shape: str) -> None:
    last = 0.01 if shape == "constant" else 0.001
    assert rates(shape, [700, 701, 5000]) == pytest.approx([last] * 3, abs=1e-12)


@pytest.mark.parametrize("kind", ["SGD", "RMSprop"])
def test_momentum_rises_with_the_rate_and_a_jump_ends_where_steps_do(kind: str) -> None:
    section = Scheduler(type="WarmupShape", params={"warmup": 6, "every": 2, "start_momentum": 0.85})
    one, other = (
        getattr(torch.optim, kind)([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9) for _ in range(2)
    )
    schedule, found = build_scheduler(one, section, 20), []
    for step in range(20):
        found.append(one.param_groups[0]["momentum"])
        jumped = build_scheduler(other, section, 20)
        jumped.forward(step)
        assert {**one.param_groups[0], "params": 0} == {**other.param_groups[0], "params": 0}
        other.param_groups[0].update(lr=0.1, momentum=0.9)
        one.step()
        schedule.step()
    rise = [0.85 + 0.05 * epoch / 3 for epoch in (0, 0, 1, 1, 2, 2)]
    assert found == pytest.approx(rise + [0.9] * 14, abs=1e-12)


def test_an_optimizer_without_momentum_keeps_its_betas_and_refuses_a_momentum() -> None:
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    build_scheduler(optimizer, Scheduler(type="WarmupShape"), 20)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    section = Scheduler(type="WarmupShape", params={"start_momentum": 0.85})
    plain = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    for without in (optimizer, plain):
        with pytest.raises(ConfigError, match=r"start_momentum 0\.85: the optimizer has no momentum: remove it"):
            build_scheduler(without, section, 20)


def test_lengths_are_in_epochs_and_a_run_may_end_within_the_rise(tmp_path: Path) -> None:
    params = {"warmup": {"epochs": 3}, "every": {"epochs": 1}}
    config = tiny_config(tmp_path, deepspeed={"scheduler": {"type": "WarmupShape", "params": params}}).in_steps(5)
    section = config.deepspeed.scheduler
    assert section is not None
    got = learning_rates(section, 1.0, 10, [0, 4, 5, 9])
    assert list(got.values()) == pytest.approx([0.1, 0.1, 0.4, 0.4])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"shape": "cosin"}, "shape: input should be 'cosine', 'cosine_restarts', .*found \"cosin\""),
        ({"every": 0}, "every: .*found 0"),
        ({"min_ratio": 1.5}, "min_ratio: .*found 1.5"),
        ({"start_momentum": 1}, "start_momentum: .*found 1"),
        ({"mode": 1}, "unknown to WarmupShape"),
    ],
)
def test_a_wrong_parameter_is_named(tmp_path: Path, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"deepspeed.scheduler.params.*{message}"):
        tiny_config(tmp_path, deepspeed={"scheduler": {"type": "WarmupShape", "params": params}})
