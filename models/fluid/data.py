"""Windows of a store: what the surrogate sees and what it must predict.

    FluidWindows(store, split, history, ...)   map-style dataset of windows, stride 1 inside a case
    collate(samples)                      {"x": [B, T, V], "target": [B, T', Vs], "mask": [B, T', Vs], "weight": [B]}

Set-points are known one minute ahead, so the tokens of minute s are boundary(s+1) and state(s), and they predict
state(s+1). A window of history T ends at minute t: s runs over t-T+1 ... t. Each of the last T' has its own target. For
training on rollouts, a window has some minutes more, and each of them has a target too.

Most of the error falls into the few minutes at which a set-point changes. Windows of these, events, can stand in an
epoch more often, each time with that much less weight: the weighted mean over an epoch stays what it is. A step's loss
is the weighted mean of its batch, so in batches of a few samples events count for more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trunkline.engine.errors import DataError
from trunkline.models.fluid.store import Store

Sample = tuple[np.ndarray, np.ndarray, np.float32]
"""(x [T + ahead, V], target [T' + ahead, Vs], weight); float32, raw physical units, NaN where a value is missing."""


class FluidWindows(Dataset[Sample]):
    """All windows of a split, M - T - ahead of each case that has outputs, and then its events again.

    With n = M - T - ahead, window i belongs to case i // n of `cases` and starts at row i % n, minute row + 1. A sample
    is read by two positioned reads; nothing of the store stays in memory. `arrays` are those that it reads.

    targets: how many of the last minutes of the history have a target, T'; all of them unless given
    ahead: minutes after the history
    event_repeats: how often an event stands among the samples. An event is a window of which the first minute after the
        history has other set-points than the minute before. Its weight is 1 / event_repeats. To find the events, the
        set-points of all cases are read, before they are verified.

    Raises DataError if `history` does not fit a case or if the split has no window.
    """

    def __init__(
        self, store: Store, split: str, history: int, targets: int | None = None, ahead: int = 0, event_repeats: int = 1
    ) -> None:
        if not 1 <= history < store.minutes - ahead:
            raise DataError(
                f"data.history is {history}: use 1 to {store.minutes - 1 - ahead}, since a case has {store.minutes} "
                "minutes" + f" of which model.rollout_minutes takes {ahead + 1}" * (ahead > 0)
            )
        self.store, self.split, self.history = store, split, history
        self.ahead, self.targets = ahead, (targets or history) + ahead
        self.cases = [case for case in store.cases(split) if store.has_state(split, case)]
        self.arrays = store.arrays_of(split, self.cases)
        self.windows_per_case = store.minutes - history - ahead
        if not self.cases:
            held = len(store.cases(split))
            why = f"its {held} cases have no outputs" if held else "it has no cases"
            raise DataError(
                f"{store.root}: split {split!r} has no windows: {why}. Prepare the data set with cases of that split"
                + (" (--val-fraction above 0 and at least two training cases)" if split == "val" else "")
            )
        self.num_windows = len(self.cases) * self.windows_per_case
        self._repeats = event_repeats
        self._events = np.empty(0, dtype=np.int64)
        if event_repeats > 1:
            self._events = np.flatnonzero(np.concatenate([self._changes(case) for case in self.cases]))
        self._weights = np.ones(self.num_windows, dtype=np.float32)
        self._weights[self._events] = 1 / event_repeats

    def __len__(self) -> int:
        return self.num_windows + (self._repeats - 1) * len(self._events)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        windows = [self._window(index) for index in indices]
        boundary, state = self.store.windows(
            self.split, [self._place(window) for window in windows], self.history + self.ahead + 1
        )
        x = np.concatenate([boundary[:, 1:], state[:, :-1]], axis=2)
        return list(zip(x, state[:, -self.targets :], self._weights[windows], strict=True))

    def locate(self, index: int) -> tuple[str, int]:
        """(case, first row) of sample `index`; the window's inputs are rows first ... first + T - 1."""
        return self._place(self._window(index))

    def _window(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        again = index - self.num_windows
        return index if again < 0 else int(self._events[again % len(self._events)])

    def _place(self, window: int) -> tuple[str, int]:
        return self.cases[window // self.windows_per_case], window % self.windows_per_case

    def _changes(self, case: str) -> np.ndarray:
        """[windows of the case] bool: whether it is an event."""
        boundary = np.asarray(self.store.boundary(self.split, case))
        changes = (boundary[1:] != boundary[:-1]).any(axis=1)  # [k]: from row k to row k + 1
        return changes[self.history - 1 :][: self.windows_per_case]


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Batch of windows.

    x       [B, T + ahead, V] fp32   boundary(s+1) then state(s); raw physical units, NaN where a value is missing
    target  [B, T' + ahead, Vs] fp32  state(s+1) of the last T' + ahead minutes; NaN where missing
    mask    [B, T' + ahead, Vs] bool  whether the target is present
    weight  [B] fp32                 of a window in the loss
    """
    x = torch.from_numpy(np.stack([sample[0] for sample in samples]))
    target = torch.from_numpy(np.stack([sample[1] for sample in samples]))
    weight = torch.from_numpy(np.array([sample[2] for sample in samples]))
    return {"x": x, "target": target, "mask": ~torch.isnan(target), "weight": weight}
