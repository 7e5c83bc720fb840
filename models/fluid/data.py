"""Windows of a store: what the surrogate sees and what it must predict.

    FluidWindows(store, split, history, ...)   map-style dataset of windows, stride 1 inside a case
    collate(samples)                      {"x": [B, T, V], "target": [B, T', Vs], "mask": [B, T', Vs]}

Set-points are known one minute ahead, so the tokens of minute s are boundary(s+1) and state(s), and they predict
state(s+1). A window of history T ends at minute t: s runs over t-T+1 ... t. Each of the last T' has its own target. For
training on rollouts, a window has some minutes more, and each of them has a target too.

Most of the error falls into the few minutes at which a set-point changes. Windows of those can stand in an epoch more
often, each with that much less weight, so that the mean over an epoch stays what it is.
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
    """All windows of a split: M - T - ahead of each case that has outputs. Cases without outputs give none.

    With n = M - T - ahead, window i belongs to case i // n of `cases` and starts at row i % n, minute row + 1. A sample
    is read by two positioned reads; nothing of the store stays in memory. `arrays` are those that it reads.

    targets: how many of the last minutes of the history have a target, T'; all of them unless given
    ahead: minutes after the history
    event_repeats: how often a window stands in an epoch whose first minute after the history has other set-points than
        the minute before; its weight is 1 / event_repeats. Samples are all windows, then these, the other times.

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

        self.windows = len(self.cases) * self.windows_per_case
        self._weights = np.ones(self.windows, dtype=np.float32)
        self._again = np.empty(0, dtype=np.int64)  # the windows that stand in an epoch once more and once more
        if event_repeats > 1:
            events = np.flatnonzero(np.concatenate([self._is_event(case) for case in self.cases]))
            self._weights[events] = 1 / event_repeats
            self._again = np.tile(events, event_repeats - 1)

    def __len__(self) -> int:
        return self.windows + len(self._again)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        places = [self.locate(index) for index in indices]
        boundary, state = self.store.windows(self.split, places, self.history + self.ahead + 1)
        x = np.concatenate([boundary[:, 1:], state[:, :-1]], axis=2)
        weights = self._weights[[self._window(index) for index in indices]]
        return list(zip(x, state[:, -self.targets :], weights, strict=True))

    def locate(self, index: int) -> tuple[str, int]:
        """(case, first row) of sample `index`; the window's inputs are rows first ... first + T - 1."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        window = self._window(index)
        return self.cases[window // self.windows_per_case], window % self.windows_per_case

    def _window(self, index: int) -> int:
        return index if index < self.windows else int(self._again[index - self.windows])

    def _is_event(self, case: str) -> np.ndarray:
        """[windows of a case] bool: whether set-points change at the first minute after the history."""
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
