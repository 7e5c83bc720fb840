"""The two baselines of every evaluation, as forecasters: persistence and ridge autoregression."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trunkline.models.fluid.normalization import Normalization
from trunkline.models.fluid.ridge import NormalEquations, RidgeAutoregression
from trunkline.models.fluid.rollout import rollout, starts, take_windows
from trunkline.models.fluid.store import Store

PENALTIES = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
DEFAULT_PENALTY = 1e-6
_HOUR = 60


class Persistence:
    """Nothing changes."""

    def __init__(self, num_boundary: int) -> None:
        self._num_boundary = num_boundary

    def next_state(self, window: Tensor) -> Tensor:
        return window[:, -1, self._num_boundary :]


class Ridge:
    """The ridge autoregression in physical units; looks at the last two minutes of a window."""

    history = 2

    def __init__(self, normalization: Normalization, fitted: RidgeAutoregression, penalty: float) -> None:
        self._normalization, self._fitted = normalization, fitted
        self.penalty = penalty

    def next_state(self, window: Tensor) -> Tensor:
        normalised = self._normalization.normalize(window[:, -2:])
        return self._normalization.restore_states(self._fitted(normalised)[:, -1])


def fit_ridge(store: Store, normalization: Normalization, device: torch.device, progress: bool = False) -> Ridge:
    """Fit on the training split; the penalty is the one whose 60-minute rollouts are best on the validation split.

    Without validation cases that have outputs, the penalty is DEFAULT_PENALTY.
    """
    equations = NormalEquations.over_training_split(store, normalization, progress)
    cases = [case for case in store.cases("val") if store.has_state("val", case)]
    best: tuple[float, Ridge] | None = None
    for penalty in PENALTIES if cases else (DEFAULT_PENALTY,):
        ridge = Ridge(normalization, equations.solve(penalty).to(device), penalty)
        error = _hour_error(store, cases, ridge, normalization, device) if cases else 0.0
        if best is None or error < best[0]:
            best = (error, ridge)
    assert best is not None
    return best[1]


def _hour_error(
    store: Store, cases: list[str], ridge: Ridge, normalization: Normalization, device: torch.device
) -> float:
    squared, count = 0.0, 0
    for case in cases:
        places = starts(store.minutes, ridge.history, _HOUR, every=_HOUR)
        boundary, states = take_windows(store, "val", [(case, row) for row in places], ridge.history + _HOUR, device)
        start, truth = states[:, : ridge.history], states[:, ridge.history :]
        predicted = rollout(ridge, boundary, start, missing=normalization.state_offset)
        error = ((predicted - truth) / normalization.state_scale)[~truth.isnan()].double()
        squared, count = squared + error.square().sum().item(), count + error.numel()
    mean = squared / max(count, 1)
    return mean if math.isfinite(mean) else math.inf
