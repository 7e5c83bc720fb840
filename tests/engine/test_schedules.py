import math

import pytest
import torch
from torch.optim import lr_scheduler

from engine.deepspeed_section import Scheduler
from engine.errors import ConfigError
from engine.schedules import build_scheduler, learning_rates, warmup_steps


def rates(kind: str, total: int = 20, **params: object) -> list[float]:
    section = Scheduler(type=kind, params=params)
    return list(learning_rates(section, 1.0, total, list(range(total))).values())


def test_warmup_cosine_rises_linearly_and_falls_to_the_last_step() -> None:
    got = rates("WarmupCosine", warmup=4, min_ratio=0.1)
    expected = [(s + 1) / 5 for s in range(4)]
    expected += [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (s - 4) / 15)) for s in range(4, 20)]
    assert got == pytest.approx(expected, abs=1e-12)
    assert got[4] == pytest.approx(1.0)
    assert got[-1] == pytest.approx(0.1)


def test_a_warmup_below_one_is_a_share_of_all_steps() -> None:
    assert rates("WarmupLinear", warmup=0.2) == rates("WarmupLinear", warmup=4)
    assert warmup_steps(Scheduler(type="WarmupLinear", params={"warmup": 0.2}), 20) == 4


def test_no_schedule_is_a_constant_rate() -> None:
    assert list(learning_rates(None, 0.3, 5, [0, 4]).values()) == [0.3, 0.3]


def test_the_cosine_does_not_rise_again_after_its_end() -> None:
    section = Scheduler(type="WarmupCosine", params={"warmup": 2})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(optimizer, section, total_steps=10)
    for _ in range(30):
        optimizer.step()
        scheduler.step()
        last = optimizer.param_groups[0]["lr"]
    assert last == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("kind", ["StepLR", "CosineAnnealingLR", "PolynomialLR"])
def test_torch_schedules_are_torch_s_own(kind: str) -> None:
    params = {
        "StepLR": {"step_size": 3},
        "CosineAnnealingLR": {"T_max": "auto"},
        "PolynomialLR": {"total_iters": "auto"},
    }
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    plain = {key: 20 if value == "auto" else value for key, value in params[kind].items()}
    reference = getattr(lr_scheduler, kind)(optimizer, **plain)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert rates(kind, **params[kind]) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest"])
def test_deepspeed_schedules_are_deepspeed_s_own(kind: str) -> None:
    from deepspeed.runtime import lr_schedules

    params = {
        "WarmupLR": {"warmup_max_lr": 1.0, "warmup_num_steps": 5},
        "WarmupDecayLR": {"total_num_steps": 20, "warmup_max_lr": 1.0, "warmup_num_steps": 5},
        "WarmupCosineLR": {"total_num_steps": 20, "warmup_num_steps": 5},
        "OneCycle": {"cycle_min_lr": 0.1, "cycle_max_lr": 1.0, "cycle_first_step_size": 5},
        "LRRangeTest": {"lr_range_test_min_lr": 0.01},
    }[kind]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = getattr(lr_schedules, kind)(optimizer, **params)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        reference.step()
    assert rates(kind, **params) == pytest.approx(expected)
    assert len(set(expected)) > 3


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (Scheduler(type="WarmupCosin"), "did you mean 'WarmupCosine'"),
        (Scheduler(type="WarmupCosine", params={"warmpu": 1}), "did you mean 'warmup'"),
        (Scheduler(type="WarmupCosine", params={"warmup": -1}), "from 0 on"),
        (Scheduler(type="WarmupCosine", params={"min_ratio": 2}), "at most 1"),
        (Scheduler(type="StepLR", params={"stepsize": 2}), "did you mean 'step_size'"),
        (Scheduler(type="StepLR"), "step_size"),
        (Scheduler(type="ReduceLROnPlateau"), "follows a metric"),
    ],
)
def test_a_schedule_that_cannot_be_built_is_a_named_error(section: Scheduler, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        learning_rates(section, 1.0, 10, [0])
