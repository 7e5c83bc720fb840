"""Rollouts: what is fed back, which boundary is seen when, and that nothing looks ahead."""

import torch

from trunkline.models.fluid.rollout import rollout, starts

B, T, S, VB, VS = 2, 3, 5, 2, 4


class Echo:
    """Next state: the sum of the last state, a tenth of the first one, and the first set-point of the minute ahead."""

    history = T

    def next_state(self, window):
        assert window.shape == (B, T, VB + VS)
        return window[:, -1, VB:] + 0.1 * window[:, 0, VB:] + window[:, -1, :1]


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(B, T + S, VB, generator=generator, dtype=torch.float64),
        torch.randn(B, T, VS, generator=generator, dtype=torch.float64),
    )


def test_feeds_back_predictions_under_the_boundary_of_the_minute_ahead():
    boundary, start = inputs()
    states = list(start.unbind(1))
    for minute in range(T, T + S):
        states.append(states[-1] + 0.1 * states[-3] + boundary[:, minute, :1])
    got = rollout(Echo(), boundary, start, missing=torch.zeros(VS, dtype=torch.float64))
    torch.testing.assert_close(got, torch.stack(states[T:], dim=1))


def test_a_later_boundary_changes_no_earlier_prediction():
    boundary, start = inputs()
    missing = torch.zeros(VS, dtype=torch.float64)
    before = rollout(Echo(), boundary, start, missing=missing)
    for minute in range(T, T + S):
        moved = boundary.clone()
        moved[:, minute:] += 1
        after = rollout(Echo(), moved, start, missing=missing)
        assert torch.equal(after[:, : minute - T], before[:, : minute - T])
        assert (after[:, minute - T :] != before[:, minute - T :]).all()


def test_a_missing_start_value_is_filled_in():
    boundary, start = inputs()
    missing = torch.arange(VS, dtype=torch.float64)
    filled, holed = start.clone(), start.clone()
    filled[0, 1, 2], holed[0, 1, 2] = 2.0, float("nan")
    torch.testing.assert_close(
        rollout(Echo(), boundary, holed, missing=missing), rollout(Echo(), boundary, filled, missing=missing)
    )


def test_no_minutes_to_predict():
    boundary, start = inputs()
    assert rollout(Echo(), boundary[:, :T], start, missing=torch.zeros(VS)).shape == (B, 0, VS)


def test_starts_leave_room_for_history_and_steps():
    assert list(starts(minutes=10, history=3, steps=4, every=2)) == [0, 2]
    assert list(starts(minutes=10, history=3, steps=7, every=1)) == [0]
    assert list(starts(minutes=10, history=3, steps=8, every=1)) == []
