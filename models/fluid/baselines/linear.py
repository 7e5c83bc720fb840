"""Persistence, and a linear autoregression in closed form over all that two minutes hold.

    state(s+1) - state(s)  =  W [boundary(s+1), state(s), state(s-1), boundary(s)] + b      in normalised units

boundary(s) says what has just been switched. On the demo's validation days RMSE at a minute, 60 minutes and a day is
.0828, .2446 and .3511 with it, .1255, .2802 and .3734 without. Three or five minutes of history gained nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from tqdm import tqdm

from trunkline.models.fluid.normalization import Normalization
from trunkline.models.fluid.ridge import Features, NormalEquations, RidgeAutoregression, two_minutes
from trunkline.models.fluid.rollout import Forecaster, rollout, starts, take_windows
from trunkline.models.fluid.store import Store

PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # below, rounding decides what a rollout of a day does
DEFAULT_PENALTY = 1e-6
HOUR, DAY = 60, 1440
_VALUES_AT_ONCE = 32 << 20  # of a batch of states


class Persistence:
    """Nothing changes."""

    history = 1

    def __init__(self, num_boundary: int) -> None:
        self._num_boundary = num_boundary

    def next_state(self, window: Tensor) -> Tensor:
        return window[:, -1, self._num_boundary :]


class LinearAutoregression(RidgeAutoregression):
    """A ridge autoregression over the given features as a forecaster, with the statistics that normalise for it."""

    history = 2

    def __init__(self, normalization: Normalization, features: Features) -> None:
        super().__init__(normalization.num_boundary, len(normalization.change), features)
        self.normalization = normalization

    def forward(self, normalised: Tensor) -> Tensor:
        """Windows [B, T, V] -> the state after each, [B, Vs], both normalised."""
        return self.next(two_minutes(normalised[:, -2:], self.num_boundary)[:, -1])

    def next_state(self, window: Tensor) -> Tensor:
        return self.normalization.restore_states(self(self.normalization.normalize(window)))


def all_columns(store: Store) -> Features:
    """All that two minutes hold."""
    return Features.columns(2 * store.schema.num_variables)


def fit_linear(
    store: Store,
    normalization: Normalization,
    features: Features,
    device: torch.device,
    *,
    noises: Iterable[float] = (0.0,),
    progress: bool = False,
) -> tuple[LinearAutoregression, dict[str, float]]:
    """Fit on the training split, and the penalty and the noise on the input states that it was fitted with.

    They are those of PENALTIES and `noises` whose 60-minute rollouts are best on the validation split. Without
    validation cases that have outputs, they are DEFAULT_PENALTY and the last of `noises`. Raises DataError.
    """
    equations = NormalEquations.over_training_split(store, normalization, features, progress)
    fitted = LinearAutoregression(normalization, features).to(device)
    choices = [(penalty, noise) for noise in noises for penalty in PENALTIES]
    if not any(store.has_state("val", case) for case in store.cases("val")):
        choices = [(DEFAULT_PENALTY, choices[-1][1])]
    best, least = choices[0], math.inf
    for choice in tqdm(choices, desc="penalty", disable=not progress, leave=False) if len(choices) > 1 else ():
        fitted.take(equations, *choice)
        error = rollout_error(store, fitted, HOUR, normalization, device)
        if error < least:
            best, least = choice, error
    fitted.take(equations, *best)
    return fitted, {"penalty": best[0], "noise": best[1]}


def rollout_error(
    store: Store, forecaster: Forecaster, minutes: int, normalization: Normalization, device: torch.device
) -> float:
    """Mean squared error, normalised, of rollouts of `minutes` each, one after another over the validation days.

    Infinite where one diverges; 0 if no validation case has outputs.
    """
    history = forecaster.history
    minutes = min(minutes, store.minutes - history)
    cases = [case for case in store.cases("val") if store.has_state("val", case)]
    places = [(case, row) for case in cases for row in starts(store.minutes, history, minutes, every=minutes)]
    size = max(1, _VALUES_AT_ONCE // (store.schema.num_states * (history + minutes)))
    squared, count = 0.0, 0
    for first in range(0, len(places), size):
        boundary, states = take_windows(store, "val", places[first : first + size], history + minutes, device)
        predicted = rollout(forecaster, boundary, states[:, :history], missing=normalization.state_offset)
        truth = states[:, history:]
        error = ((predicted - truth) / normalization.state_scale)[~truth.isnan()].double()
        squared, count = squared + error.square().sum().item(), count + error.numel()
    mean = squared / max(count, 1)
    return mean if math.isfinite(mean) else math.inf
