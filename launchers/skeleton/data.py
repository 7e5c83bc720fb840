"""The samples: here points (x, y) of a sine with noise. Read your own data in their place."""

from __future__ import annotations

import torch
from torch import Tensor

from trunkline.engine.errors import DataError
from trunkline.launchers.skeleton.config import Data

SPLITS = ("train", "val", "test")


def read(data: Data, split: str) -> list[dict[str, Tensor]]:
    """{"x": [1], "y": [1]} of each point: anything with a length and an index will do. Raises DataError."""
    if split not in SPLITS:
        raise DataError(f"{split}: there is no such split: use one of {', '.join(SPLITS)}")
    generator = torch.Generator().manual_seed(SPLITS.index(split))
    x = 6 * torch.rand(data.points, 1, generator=generator) - 3
    y = torch.sin(x) + data.noise * torch.randn(data.points, 1, generator=generator)
    return [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
