"""Texts as samples, and how they become batches.

    Texts(store, split, data)     a text a sample, cut by token, EOS at its end
    collate(samples, ...)         the batch: tokens [B, S S] int64, row by row, and length [B] int64

What lies behind a text's tokens is padding; its pixels are black, and no loss is of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trunkline.engine.data.store import Array
from trunkline.engine.errors import DataError
from trunkline.models.token_image.config import TokenImageData
from trunkline.models.token_image.store import Store


class Texts(Dataset[np.ndarray]):
    """The tokens of a text a sample, int64 [n]. Raises DataError for a split that is not there or empty.

    notes: what was cut, for a person to read
    """

    def __init__(self, store: Store, split: str, data: TokenImageData, eos_id: int) -> None:
        self._tokens, self._most, self._eos = store.tokens(split, "texts"), data.capacity, eos_id
        if not len(self._tokens):
            raise DataError(f"{store.root}: the split {split} is empty: prepare other data")
        lengths = self._tokens.lengths + 1
        lost = np.maximum(lengths - self._most, 0)
        self.notes = [
            f"{(lost > 0).sum():,} of {len(lengths):,} texts are longer than {self._most:,} tokens with EOS and cut "
            f"off; {lost.sum():,} tokens are lost"
        ] * bool(lost.any())

    @property
    def arrays(self) -> list[Array]:
        """What is read of the store."""
        return self._tokens.arrays

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return np.append(self._tokens(index, 0, self._most - 1), self._eos)


def collate(samples: Sequence[np.ndarray], pixels: int) -> dict[str, Tensor]:
    """See the top of this file."""
    tokens = np.zeros((len(samples), pixels), np.int64)
    for row, sample in zip(tokens, samples, strict=True):
        row[: len(sample)] = sample
    return {"tokens": torch.from_numpy(tokens), "length": torch.tensor([len(sample) for sample in samples])}
