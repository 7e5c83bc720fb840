"""Normalization: physical units to numbers near one, and back.

Its buffers stay fp32 whatever the engine casts.

Fitted on the training split's statistics. A column that (nearly) does not vary there is guarded: dividing by its spread
would blow up rounding noise, or the first value that differs from it, so its own magnitude scales it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_RELATIVE_SPREAD = 1e-5  # below this share of the magnitude, a spread is that of the file's decimals
_ABSOLUTE_SPREAD = 1e-6
_LEAST_CHANGE = 1e-3  # normalised: the least that a minute's change is scaled by


class Fp32Buffers(nn.Module):
    """A module whose buffers are never narrowed: `module.to(bfloat16)` moves them, but does not round them.

    An engine may cast a whole module, buffers included, and eight bits cannot hold what a pressure moves in a minute.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = getattr(self, name)
            if after.dtype.itemsize < buffer.dtype.itemsize:
                setattr(self, name, buffer.to(after.device))
        return self


class Normalization(Fp32Buffers):
    """value = offset + scale * normalised, per column; and the scale of a state's change within a minute.

    offset, scale   [V] fp32, physical units
    change          [Vs] fp32, normalised units: standard deviation of the one-minute change
    """

    offset: Tensor
    scale: Tensor
    change: Tensor

    def __init__(self, num_boundary: int, num_states: int) -> None:
        super().__init__()
        self.num_boundary = num_boundary
        num_variables = num_boundary + num_states
        self.register_buffer("offset", torch.zeros(num_variables, dtype=torch.float32))
        self.register_buffer("scale", torch.ones(num_variables, dtype=torch.float32))
        self.register_buffer("change", torch.ones(num_states, dtype=torch.float32))

    def fit(self, statistics: dict[str, np.ndarray], kind: str) -> Normalization:
        """Take offset and scale from a store's statistics (fp64 [V] each); kind: standard, minmax or robust."""
        offset, scale = offset_and_scale(statistics, kind)
        change = statistics["change_std"] / scale
        self.offset.copy_(torch.from_numpy(offset))
        self.scale.copy_(torch.from_numpy(scale))
        self.change.copy_(torch.from_numpy(np.maximum(change[self.num_boundary :], _LEAST_CHANGE)))
        return self

    def normalize(self, x: Tensor) -> Tensor:
        """Physical [..., V] -> normalised fp32; a missing value (NaN) becomes 0, the offset."""
        return ((x - self.offset) / self.scale).nan_to_num(nan=0.0)

    def normalize_states(self, states: Tensor) -> Tensor:
        """Physical [..., Vs] -> normalised fp32; NaN stays NaN."""
        return (states - self.state_offset) / self.state_scale

    def restore_states(self, normalised: Tensor) -> Tensor:
        """Normalised [..., Vs] -> physical fp32."""
        return self.state_offset + self.state_scale * normalised

    @property
    def state_offset(self) -> Tensor:
        return self.offset[self.num_boundary :]

    @property
    def state_scale(self) -> Tensor:
        return self.scale[self.num_boundary :]


def offset_and_scale(statistics: dict[str, Any], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(offset, scale) of each column, fp64 [V], near-constant columns guarded."""
    if kind == "standard":
        offset, spread = statistics["mean"], statistics["std"]
    elif kind == "minmax":
        offset = (statistics["max"] + statistics["min"]) / 2
        spread = (statistics["max"] - statistics["min"]) / 2
    elif kind == "robust":
        offset, spread = statistics["median"], statistics["iqr"]
        # A set-point that moves for less than a quarter of the time has no interquartile range.
        spread = np.where(spread > 0.05 * statistics["std"], spread, statistics["std"])
    else:
        raise ValueError(f"normalization must be standard, minmax or robust; got {kind!r}")
    magnitude = np.abs(offset)
    varies = spread > _RELATIVE_SPREAD * magnitude + _ABSOLUTE_SPREAD
    return offset, np.where(varies, spread, np.maximum(magnitude, 1.0))
