from __future__ import annotations

import random

import pytest

from trunkline.engine.backends.deepspeed import join
from trunkline.engine.config.deepspeed_section import Fp16
from trunkline.engine.optim.loss_scaling import LossScaler
from trunkline.engine.ranks.distributed import start


@pytest.mark.parametrize("seed", range(60))
def test_the_scale_follows_deepspeed_s_step_by_step(seed: int) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    join(start().device)  # its scaler asks for the rank before it logs
    draw = random.Random(seed)
    settings = Fp16(
        enabled=True,
        initial_scale_power=draw.randint(2, 8),
        loss_scale_window=draw.randint(1, 6),
        hysteresis=draw.randint(0, 4),
        consecutive_hysteresis=draw.random() < 0.5,
        min_loss_scale=draw.choice([0.25, 1.0, 3.0]),
    )
    ours = LossScaler.of(settings)
    theirs = DynamicLossScaler(
        2.0**settings.initial_scale_power,
        settings.loss_scale_window,
        settings.min_loss_scale,
        settings.hysteresis,
        settings.consecutive_hysteresis,
        raise_error_at_min_scale=False,
    )
    likelihood = draw.choice([0.05, 0.3, 0.7])
    for step in range(200):
        if step % 50 == 49:  # a run that is resumed
            state, ours = ours.state(), LossScaler.of(settings)
            ours.load(state)
        overflow = draw.random() < likelihood
        theirs.update_scale(overflow)
        ours.update(overflow)
        assert ours.state() == {
            "scale": theirs.cur_scale,
            "iteration": theirs.cur_iter,
            "last_overflow": theirs.last_overflow_iter,
            "hysteresis": theirs.cur_hysteresis,
        }


def test_a_static_scale_and_no_scale_stay_as_they_are() -> None:
    for settings, scale in ((Fp16(enabled=True, loss_scale=64), 64), (Fp16(), 1)):
        scaler = LossScaler.of(settings)
        for overflow in (True, False, True):
            scaler.update(overflow)
        assert scaler.scale == scale
        assert scaler.state() == {}
