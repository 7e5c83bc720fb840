import inspect
import math
import random
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from trunkline.engine.config.deepspeed_schedules import DEEPSPEED_SCHEDULES
from trunkline.engine.config.deepspeed_section import Scheduler
from trunkline.engine.config.strict import validated
from trunkline.engine.errors import ConfigError
from trunkline.engine.optim.schedules import build_scheduler, learning_rates, warmup_steps


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


def test_inverse_sqrt_is_t5_s_with_lr_at_its_peak() -> None:
    t5 = [1 / math.sqrt(max(step, 4)) for step in range(20)]  # mesh_tensorflow's learning_rate_schedule_noam, no rise
    assert rates("InverseSqrt", warmup=4) == pytest.approx([2 * rate for rate in t5], rel=1e-12)
    assert rates("InverseSqrt", total=500, warmup=4)[:20] == rates("InverseSqrt", warmup=4), "of any length"
    assert rates("InverseSqrt") == [1.0] * 20
    assert rates("InverseSqrt", warmup=0)[:3] == [1.0, 1.0, pytest.approx(2**-0.5)]


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


def draw_params(kind: str, draw: random.Random) -> dict[str, Any]:
    """Parameters of one of DeepSpeed's schedules; any that has a default is left out half of the time."""
    warmup = {
        "warmup_num_steps": draw.choice([1, 2, 5, 30, 90]),
        "warmup_type": draw.choice(["log", "linear"]),
        "warmup_min_lr": draw.choice([0.0, draw.uniform(0, 0.1)]),
    }
    required, optional = {
        "WarmupLR": ({}, warmup | {"warmup_max_lr": draw.uniform(0.1, 1)}),
        "WarmupDecayLR": ({"total_num_steps": draw.randint(2, 60)}, warmup | {"warmup_max_lr": draw.uniform(0.1, 1)}),
        "WarmupCosineLR": (
            {"total_num_steps": draw.randint(2, 60)},
            {key: warmup[key] for key in ("warmup_num_steps", "warmup_type")}
            | {"warmup_min_ratio": draw.random(), "cos_min_ratio": draw.random()},
        ),
        "OneCycle": (
            {"cycle_min_lr": draw.uniform(0, 0.1), "cycle_max_lr": draw.uniform(0.1, 1)},
            {
                "decay_lr_rate": draw.uniform(0, 0.1),
                "cycle_first_step_size": draw.randint(1, 30),
                "cycle_second_step_size": draw.randint(0, 30),
                "cycle_first_stair_count": draw.randint(0, 5),
                "cycle_second_stair_count": draw.randint(0, 5),
                "decay_step_size": draw.randint(0, 10),
                "cycle_momentum": draw.random() < 0.5,
                "cycle_min_mom": draw.uniform(0.5, 0.8),
                "cycle_max_mom": draw.uniform(0.8, 0.9),
                "decay_mom_rate": draw.uniform(0, 0.001),
            },
        ),
        "LRRangeTest": (
            {},
            {
                "lr_range_test_min_lr": draw.uniform(0.001, 0.1),
                "lr_range_test_step_size": draw.randint(1, 30),
                "lr_range_test_step_rate": draw.uniform(0, 2),
                "lr_range_test_staircase": draw.random() < 0.5,
            },
        ),
    }[kind]
    return required | {key: value for key, value in optional.items() if draw.random() < 0.5}


DEEPSPEED_KINDS = ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "OneCycle", "LRRangeTest"]


@pytest.mark.parametrize("kind", DEEPSPEED_KINDS)
def test_deepspeed_schedules_equal_deepspeed_s_own_to_the_last_bit(kind: str) -> None:
    from deepspeed.runtime import lr_schedules

    draw = random.Random(kind)
    for _ in range(40):
        params = draw_params(kind, draw)
        ours, theirs = (torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.3) for _ in range(2))
        scheduler = build_scheduler(ours, Scheduler(type=kind, params=params), total_steps=70)
        reference = getattr(lr_schedules, kind)(theirs, **params)
        for step in range(80):
            for key in ("lr", "betas"):
                found, expected = ours.param_groups[0][key], theirs.param_groups[0][key]
                assert found == expected, (params, step, key)
            for optimizer in (ours, theirs):
                optimizer.step()
            scheduler.step()
            reference.step()


@pytest.mark.parametrize("kind", DEEPSPEED_KINDS)
def test_each_parameter_of_a_deepspeed_schedule_is_known_with_its_default(kind: str) -> None:
    from deepspeed.runtime import lr_schedules

    theirs = dict(inspect.signature(getattr(lr_schedules, kind)).parameters)
    ours = dict(inspect.signature(DEEPSPEED_SCHEDULES[kind]).parameters)
    assert list(theirs)[1:-1] == list(ours)[1:]  # without the optimizer, and the place to go on from
    for key in list(ours)[1:]:
        expected = None if key == "cycle_momentum" else theirs[key].default  # None: wherever there is a momentum
        assert ours[key].default == expected, key


def test_one_cycle_leaves_an_optimizer_without_betas_its_momentum() -> None:
    cycle = {"cycle_min_lr": 0.1, "cycle_max_lr": 1.0}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    build_scheduler(optimizer, Scheduler(type="OneCycle", params=cycle), 10)
    assert optimizer.param_groups[0]["lr"] == 0.1
    with pytest.raises(ConfigError, match="cycle_momentum needs an optimizer with betas"):
        build_scheduler(optimizer, Scheduler(type="OneCycle", params=cycle | {"cycle_momentum": True}), 10)


@pytest.mark.parametrize(
    "section",
    [
        None,
        *(Scheduler(type=kind, params=draw_params(kind, random.Random(0))) for kind in DEEPSPEED_KINDS),
        Scheduler(type="WarmupCosine"),
        Scheduler(type="CosineAnnealingLR", params={"T_max": 7}),
        Scheduler(type="CosineAnnealingWarmRestarts", params={"T_0": 3}),
        Scheduler(type="OneCycleLR", params={"max_lr": 0.1, "total_steps": 60}),
        Scheduler(type="ExponentialLR", params={"gamma": 0.9}),
    ],
    ids=lambda section: section.type if section else "none",
)
def test_fast_forward_ends_where_stepping_does_to_the_last_bit(
    section: Scheduler | None, recwarn: pytest.WarningsRecorder
) -> None:
    def fresh() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
        return optimizer, build_scheduler(optimizer, section, total_steps=60)

    optimizer, scheduler = fresh()
    for step in range(50):
        other, forwarded = fresh()
        forwarded.forward(step)
        for _ in range(2):
            for key in ("lr", "betas"):
                assert other.param_groups[0][key] == optimizer.param_groups[0][key], step
            other.step()
            forwarded.step()
            optimizer.step()
            scheduler.step()
        optimizer, scheduler = fresh()
        for _ in range(step + 1):
            optimizer.step()
            scheduler.step()
    assert not recwarn.list


def test_a_schedule_without_recurrence_is_forwarded_in_no_time() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = build_scheduler(optimizer, Scheduler(type="WarmupCosine"), total_steps=10**12)
    scheduler.forward(10**12 - 1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("WarmupCosin", {}, "did you mean 'WarmupCosine'"),
        ("WarmupCosine", {"warmpu": 1}, "did you mean 'warmup'"),
        ("WarmupCosine", {"warmup": -1}, "from 0 on"),
        ("WarmupCosine", {"min_ratio": 2}, "less than or equal to 1"),
        ("WarmupLR", {"warmup_steps": 2}, "did you mean 'warmup_num_steps'"),
        ("WarmupLR", {"warmup_num_steps": 0}, "must be a positive integer"),
        ("WarmupLR", {"warmup_type": "cosine"}, "'log' or 'linear'"),
        ("WarmupLR", {"last_batch_iteration": 3}, "unknown to WarmupLR"),
        ("WarmupDecayLR", {}, "total_num_steps"),
        ("StepLR", {"stepsize": 2}, "did you mean 'step_size'"),
        ("StepLR", {}, "step_size"),
        ("ReduceLROnPlateau", {}, "follows a metric"),
    ],
)
def test_a_schedule_that_cannot_be_built_is_a_named_error(kind: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validated(Scheduler, {"type": kind, "params": params}, "deepspeed.scheduler", "run.json")
