"""Windows of a store: what the surrogate sees and what it must predict.

    FluidWindows(store, split, history, ...)   map-style dataset of windows, stride 1 inside a case
    collate(samples)                      {"x": [B, T, V], "target": [B, T', Vs], "mask": [B, T', Vs]}

Set-points are known one minute ahead, so the tokens of minute s are boundary(s+1) and state(s), and they predict
state(s+1). A window of history T ends at minute t: s runs over t-T+1 ... t. Each of the last T' has its own target. For
training on rollouts, a window has some minutes more, and each of them has a target too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trunkline.engine.errors import DataError
from trunkline.models.fluid.store import Store

Sample = tuple[np.ndarray, np.ndarray]
"""(x [T + ahead, V], target [T' + ahead, Vs]), float32, raw physical units, NaN where a value is missing."""


class FluidWindows(Dataset[Sample]):
    """All windows of a split: M - T - ahead of each case that has outputs. Cases without outputs give none.

    With n = M - T - ahead, sample i belongs to case i // n of `cases` and starts at row i % n, minute row + 1. A sample
    is read by two positioned reads; nothing of the store stays in memory. `arrays` are those that it reads.

    targets: how many of the last minutes of the history have a target, T'; all of them unless given
    ahead: minutes after the history

    Raises DataError if `history` does not fit a case or if the split has no window.
    """

    def __init__(self, store: Store, split: str, history: int, targets: int | None = None, ahead: int = 0) -> None:
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

    def __len__(self) -> int:
        return len(self.cases) * self.windows_per_case

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        places = [self.locate(index) for index in indices]
        boundary, state = self.store.windows(self.split, places, self.history + self.ahead + 1)
        x = np.concatenate([boundary[:, 1:], state[:, :-1]], axis=2)
        return list(zip(x, state[:, -self.targets :], strict=True))

    def locate(self, index: int) -> tuple[str, int]:
        """(case, first row) of window `index`; the window's inputs are rows first ... first + T - 1."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return self.cases[index // self.windows_per_case], index % self.windows_per_case


def collate(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Batch of windows.

    x       [B, T + ahead, V] fp32   boundary(s+1) then state(s); raw physical units, NaN where a value is missing
    target  [B, T' + ahead, Vs] fp32  state(s+1) of the last T' + ahead minutes; NaN where missing
    mask    [B, T' + ahead, Vs] bool  whether the target is present
    """
    x = torch.from_numpy(np.stack([sample[0] for sample in samples]))
    target = torch.from_numpy(np.stack([sample[1] for sample in samples]))
    return {"x": x, "target": target, "mask": ~torch.isnan(target)}
