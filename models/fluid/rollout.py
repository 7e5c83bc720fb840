"""Rollouts: predictions fed back as inputs, minute after minute, under a known boundary.

A forecaster answers one question, "given a window, what is the next state?"; persistence, ridge and the decoder all do,
so one loop rolls them all out. The boundary of the minute that is predicted is always the file's own.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from models.fluid.network import FluidDecoder
from models.fluid.normalization import Normalization
from models.fluid.ridge import RidgeAutoregression


class Forecaster(Protocol):
    """Predicts one minute ahead from a window."""

    def next_state(self, window: Tensor) -> Tensor:
        """window [B, T, V], physical: boundary(s+1) then state(s). Returns the state after it, [B, Vs], physical."""


@torch.no_grad()
def rollout(
    forecaster: Forecaster, boundary: Tensor, start: Tensor, *, missing: Tensor, progress: str | None = None
) -> Tensor:
    """States that follow `start` under `boundary`.

    boundary  [B, T + S, Vb]  physical, the minutes of `start` and the S minutes to predict
    start     [B, T, Vs]      physical, NaN where missing
    missing   [Vs]            what stands in for a missing start value
    progress  a title for a progress bar over the minutes

    Returns [B, S, Vs], physical. Minute k of it depends on nothing later than boundary[:, T + k].
    """
    T = start.shape[1]
    states = torch.where(start.isnan(), missing, start)
    predicted = []
    for k in tqdm(range(boundary.shape[1] - T), desc=progress, unit="min", disable=progress is None, leave=False):
        window = torch.cat([boundary[:, k + 1 : k + 1 + T], states], dim=-1)
        following = forecaster.next_state(window)
        predicted.append(following)
        states = torch.cat([states[:, 1:], following[:, None]], dim=1)
    return torch.stack(predicted, dim=1) if predicted else start[:, :0]


class Persistence:
    """Nothing changes."""

    def __init__(self, num_boundary: int) -> None:
        self._num_boundary = num_boundary

    def next_state(self, window: Tensor) -> Tensor:
        return window[:, -1, self._num_boundary :]


class Ridge:
    """The ridge autoregression, in physical units."""

    def __init__(self, normalization: Normalization, fitted: RidgeAutoregression) -> None:
        self._normalization, self._fitted = normalization, fitted

    def next_state(self, window: Tensor) -> Tensor:
        normalised = self._normalization.normalize(window[:, -2:])
        return self._normalization.restore_states(self._fitted(normalised)[:, -1])


class Surrogate:
    """A trained decoder."""

    def __init__(self, model: nn.Module | FluidDecoder) -> None:
        self._model = model

    def next_state(self, window: Tensor) -> Tensor:
        return self._model(window)[:, -1]
