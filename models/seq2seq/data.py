"""Samples for training, and how they become batches.

    PairSamples(store, split, data)       a prompt and a response a sample, each cut by token, its EOS kept
    collate(samples, ...)                 the batch

A batch of pairs, N and M the longest row's tokens rounded up to a multiple of 8, within the limits of `data`:

    input_ids          [B, N] int64  what the encoder reads, PAD behind it
    input_document     [B, N] int64  the number of the sample within its row, -1 at padding
    decoder_input_ids  [B, M] int64  PAD (the start), then the targets but for the last
    targets            [B, M] int64  what the decoder writes; IGNORE at padding
    target_document    [B, M] int64  as input_document
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
from trunkline.models.seq2seq.config import Seq2SeqData
from trunkline.models.seq2seq.store import Store
from trunkline.models.text.linear_loss import IGNORE

LENGTH_MULTIPLE = 8  # few different shapes of batches


class Pair(NamedTuple):
    """int64 [n] and [m], both with EOS at their end."""

    input: np.ndarray
    target: np.ndarray


class PairSamples(Dataset[Pair]):
    """One pair a sample. Raises DataError for a split that is not there or empty.

    lengths: int64 [P], tokens of input and target together, as they are cut
    notes: what was cut, for a person to read
    """

    def __init__(self, store: Store, split: str, data: Seq2SeqData, eos_id: int) -> None:
        self._inputs, self._targets, self._eos = store.inputs(split), store.targets(split), eos_id
        self._most = data.max_source_length, data.max_target_length
        if not len(self._inputs):
            raise DataError(f"{store.root}: the split {split} is empty: prepare other data")
        lengths = self._inputs.lengths + 1, self._targets.lengths + 1
        self.lengths = sum(np.minimum(length, most) for length, most in zip(lengths, self._most, strict=True))
        self.notes = [
            f"{(length > most).sum():,} of {len(length):,} {what} are longer than data.{key} = {most} and cut off on "
            f"the right; {np.maximum(length - most, 0).sum():,} tokens are lost"
            for length, most, what, key in zip(
                lengths, self._most, ("prompts", "responses"), ("max_source_length", "max_target_length"), strict=True
            )
            if (length > most).any()
        ]

    @property
    def arrays(self) -> list[Array]:
        """What is read of the store."""
        return [*self._inputs.arrays, *self._targets.arrays]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        parts = zip((self._inputs, self._targets), self._most, strict=True)
        return Pair(*(np.append(part.tokens(index, 0, most - 1), self._eos) for part, most in parts))


def collate(rows: Sequence[Sequence[Pair]], pad_id: int, data: Seq2SeqData) -> dict[str, Tensor]:
    """The batch of these rows, each of one pair or several. See the top of this file."""
    sides = [[[pair[side] for pair in row] for row in rows] for side in (0, 1)]
    (inputs, input_document), (targets, target_document) = (
        _padded(side, most) for side, most in zip(sides, (data.max_source_length, data.max_target_length), strict=True)
    )
    first = np.diff(target_document, prepend=-1, axis=1) != 0  # of each sample's targets
    before = np.where(first, pad_id, np.roll(targets, 1, axis=1))
    batch = {
        "input_ids": np.where(input_document < 0, pad_id, inputs),
        "input_document": input_document,
        "decoder_input_ids": np.where(target_document < 0, pad_id, before),
        "targets": np.where(target_document < 0, IGNORE, targets),
        "target_document": target_document,
    }
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _padded(rows: Sequence[Sequence[np.ndarray]], most: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and numbers of documents, int64 [B, L]."""
    longest = max(sum(map(len, row)) for row in rows)
    length = max(longest, min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, most))
    tokens, document = np.zeros((len(rows), length), np.int64), np.full((len(rows), length), -1)
    for r, row in enumerate(rows):
        start = 0
        for number, part in enumerate(row):
            tokens[r, start : start + len(part)] = part
            document[r, start : start + len(part)] = number
            start += len(part)
    return tokens, document
