"""Rollouts: predictions fed back as inputs, minute after minute, under a known boundary.

A forecaster answers one question, "given a window, what is the next state?"; persistence, ridge and the decoder all do,
so one loop rolls them all out. The boundary of the minute that is predicted is always the file's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from trunkline.models.fluid.store import Store


class Forecaster(Protocol):
    """Predicts one minute ahead. history: how many minutes of a window it looks at."""

    history: int

    def next_state(self, window: Tensor) -> Tensor:
        """window [B, T, V], physical: boundary(s+1) then state(s). Returns the state after it, [B, Vs], physical."""


class Surrogate:
    """A trained decoder as a forecaster."""

    def __init__(self, model: nn.Module, history: int) -> None:
        self._model, self.history = model, history

    def next_state(self, window: Tensor) -> Tensor:
        return self._model(window)[:, -1]


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


def starts(minutes: int, history: int, steps: int, every: int) -> range:
    """First rows of windows of `history` + `steps` rows in a case of `minutes` rows, one every `every` rows."""
    return range(0, minutes - history - steps + 1, every)


def take_windows(
    store: Store, split: str, places: Sequence[tuple[str, int]], rows: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(boundary [B, rows, Vb], state [B, rows, Vs]) of the windows that begin at the given (case, row)."""
    boundary, state = store.windows(split, places, rows)
    return torch.from_numpy(boundary).to(device), torch.from_numpy(state).to(device)
