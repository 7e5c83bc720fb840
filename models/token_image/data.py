"""Texts as samples, and how they become batches.

    Texts(store, split, data)     an image a sample, its text cut by token, EOS where there is room
    collate(samples, ...)         the batch

    tokens             [B, S S] int64  row by row; 0 behind the text
    length             [B] int64       how many of them are the text's, EOS included
    condition          [B, S S] int64  of kind "dialogues", as tokens
    condition_length   [B] int64       0 where there is none; otherwise with its EOS

What lies behind a text's tokens is padding; its pixels are black, and no loss is of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trunkline.engine.data.store import Array
from trunkline.engine.errors import DataError
from trunkline.models.token_image.config import TokenImageData
from trunkline.models.token_image.store import Store


class Sample(NamedTuple):
    """int64 [n] and [m]."""

    text: np.ndarray
    condition: np.ndarray | None = None


class Texts(Dataset[Sample]):
    """The tokens of an image a sample. Raises DataError for a split that is not there or empty.

    Where `data.stride` is given, a text gives an image at every such token as long as it has more than the image
    before it held; elsewhere, and in splits that are not trained on, images do not overlap.

    notes: what was cut, for a person to read
    """

    def __init__(self, store: Store, split: str, data: TokenImageData, eos_id: int) -> None:
        self._texts, self._most, self._eos = store.column(split, "text"), data.capacity, eos_id
        self._conditions = store.column(split, "condition") if store.kind == "dialogues" else None
        self._lengths = self._texts.lengths
        if not len(self._lengths):
            raise DataError(f"{store.root}: the split {split} is empty: prepare other data")
        self._stride = self._most if data.stride is None or split != "train" else data.stride
        beyond = np.maximum(self._lengths - self._most, 0)
        images = -(-beyond // self._stride) + 1 if data.stride is not None else np.ones_like(beyond)
        self._first = np.concatenate([[0], np.cumsum(images)])
        self._cuts = data.stride is None
        self.notes = []
        if self._cuts:
            self.notes += self._lost("texts", self._lengths, "data.stride makes further images of them")
        if self._conditions:
            remedy = "raise data.img_size or data.max_tokens"
            self.notes += self._lost("conditions", self._conditions.lengths, remedy)

    @property
    def arrays(self) -> list[Array]:
        """What is read of the store."""
        return [*self._texts.arrays, *(self._conditions.arrays if self._conditions else [])]

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        text = int(np.searchsorted(self._first, index, side="right")) - 1
        start, is_last = (index - int(self._first[text])) * self._stride, index + 1 == self._first[text + 1]
        tokens = self._texts.tokens(text, start, start + self._most)
        if is_last:
            tokens = self._ended(tokens, start + len(tokens) < self._lengths[text])
        if self._conditions is None:
            return Sample(tokens)
        condition = self._conditions.tokens(text, 0, self._most + 1)
        if len(condition):
            condition = self._ended(condition[: self._most], len(condition) > self._most)
        return Sample(tokens, condition)

    def _ended(self, tokens: np.ndarray, is_cut: bool) -> np.ndarray:
        """With EOS where there is room, or in place of the last token of what is cut."""
        return np.append(tokens[:-1] if is_cut else tokens, self._eos)[: self._most]

    def _lost(self, what: str, lengths: np.ndarray, remedy: str) -> list[str]:
        longer = lengths[lengths > self._most]
        lost = (longer - self._most + 1).sum()
        return [
            f"{len(longer):,} of {len(lengths):,} {what} are longer than {self._most:,} tokens and cut off; {lost:,} "
            f"tokens are lost: {remedy}"
        ] * bool(len(longer))


def collate(samples: Sequence[Sample], pixels: int) -> dict[str, Tensor]:
    """See the top of this file."""
    tokens, length = collate_tokens([sample.text for sample in samples], pixels)
    batch = {"tokens": tokens, "length": length}
    if any(sample.condition is not None for sample in samples):
        empty = np.zeros(0, np.int64)
        conditions = [empty if sample.condition is None else sample.condition for sample in samples]
        batch["condition"], batch["condition_length"] = collate_tokens(conditions, pixels)
    return batch


def collate_tokens(rows: Sequence[np.ndarray], pixels: int, fill: int = 0) -> tuple[Tensor, Tensor]:
    """int64 [B, pixels], each row and `fill` behind it; and the lengths [B]."""
    found = np.full((len(rows), pixels), fill, np.int64)
    for place, row in zip(found, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(found), torch.tensor([len(row) for row in rows])
