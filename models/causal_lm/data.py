"""Datasets of a store's sequences, and their batches.

    Padded(sequences, kind, max_length)   a sample is one piece
    Packed(sequences, kind, max_length)   a sample is a row of pieces, as many as fit (models/causal_lm/packing.py)
    Pairs(sequences, max_length)          a sample is (chosen, rejected)
    collate(samples, pad_id)              the batch of the first two
    collate_pairs(samples, pad_id)        the batch of the third

A text longer than `max_length` is cut into pieces that overlap by one token, so every token but the first is predicted
exactly once. A conversation or an answer is cut off on the right, and left out if that leaves nothing to be learned; a
pair also if that leaves no difference. `notes` of a dataset says how many met any of it, in lines for a person to read.
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
from trunkline.models.causal_lm.packing import pack
from trunkline.models.causal_lm.records import Kind
from trunkline.models.causal_lm.store import Sequences
from trunkline.models.text.linear_loss import IGNORE

_LENGTH_MULTIPLE = 16  # few different shapes of batches, and whole tiles for the kernels


class Piece(NamedTuple):
    """tokens: int64 [n]. learned: bool [n], those that carry loss where they are predicted, which token 0 never is."""

    tokens: np.ndarray
    learned: np.ndarray


class _Pieces:
    """Where the pieces of all sequences lie: int64 [P] each, in the order of the sequences."""

    def __init__(self, sequences: Sequences, kind: Kind, max_length: int) -> None:
        if max_length < 2:
            raise DataError(
                f"data.max_length is {max_length}: use 2 or more, since the first token predicts the second"
            )
        lengths, what = sequences.lengths, _NAMES[kind]
        total, longer = len(lengths), lengths > max_length
        if kind == "text":
            counts = np.where(lengths < 2, 0, -(-(lengths - 1) // (max_length - 1)))
            self.sequence = np.repeat(np.arange(total), counts)
            number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            self.start = number * (max_length - 1)
            fates = [
                (longer, f"longer than data.max_length = {max_length} and cut into {counts[longer].sum():,} pieces"),
                (lengths < 2, "shorter than two tokens, predict nothing and are left out"),
            ]
        else:
            short = np.minimum(lengths, max_length)
            keeps = sequences.first_learned < short
            equal = np.zeros(total, bool)
            if kind == "preferences":  # a pair needs both its sides
                keeps, longer, total = keeps[0::2] & keeps[1::2], longer[0::2] | longer[1::2], total // 2
                equal = keeps & sequences.equal_pairs(max_length)
            used = keeps & ~equal
            self.sequence = np.flatnonzero(np.repeat(used, 2) if kind == "preferences" else used)
            self.start = np.zeros(len(self.sequence), np.int64)
            fates = [
                (longer, f"longer than data.max_length = {max_length} and cut off on the right"),
                (~keeps, "left out, because no token of the answer is left to be predicted"),
                (equal, f"left out, because chosen and rejected are the same in their first {max_length} tokens"),
            ]
        self.length = np.minimum(lengths[self.sequence] - self.start, max_length)
        self.notes = [f"{sel.sum():,} of {total:,} {what} are {fate}" for sel, fate in fates if sel.any()]
        if not len(self.sequence):
            said = "; ".join(self.notes) or "the split is empty"
            raise DataError(f"no {what} to learn from: {said}: raise data.max_length, or prepare other data")

    def read(self, sequences: Sequences, piece: int) -> Piece:
        index, start = int(self.sequence[piece]), int(self.start[piece])
        stop = start + int(self.length[piece])
        return Piece(sequences.tokens(index, start, stop), sequences.loss_mask(index, start, stop))


_NAMES = {"text": "documents", "conversations": "conversations", "preferences": "pairs"}


class _OfSequences:
    _sequences: Sequences

    @property
    def arrays(self) -> list[Array]:
        """What is read of the store."""
        return list(self._sequences.arrays.values())


class Padded(_OfSequences, Dataset[Piece]):
    """One piece a sample. Raises DataError if no sequence can be learned from.

    lengths: int64 [P], the number of tokens of each sample
    """

    def __init__(self, sequences: Sequences, kind: Kind, max_length: int) -> None:
        self._sequences, self._pieces = sequences, _Pieces(sequences, kind, max_length)
        self.notes, self.lengths = self._pieces.notes, self._pieces.length

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Piece:
        _check_index(index, len(self))
        return self._pieces.read(self._sequences, index)


class Packed(_OfSequences, Dataset[list[Piece]]):
    """A row of pieces a sample, at most `max_length` tokens together. Raises DataError as Padded does.

    lengths: int64 [R], the number of tokens of each row
    """

    def __init__(self, sequences: Sequences, kind: Kind, max_length: int) -> None:
        self._sequences, self._pieces = sequences, _Pieces(sequences, kind, max_length)
        self._packing = pack(self._pieces.length, max_length)
        self.lengths = np.add.reduceat(self._pieces.length[self._packing.order], self._packing.row_starts[:-1])
        fill = self.lengths.sum() / (len(self.lengths) * max_length)
        self.notes = [
            *self._pieces.notes,
            f"{len(self._pieces.length):,} pieces are packed into {len(self.lengths):,} rows, {fill:.1%} full",
        ]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> list[Piece]:
        _check_index(index, len(self))
        start, stop = self._packing.row_starts[index : index + 2]
        return [self._pieces.read(self._sequences, int(piece)) for piece in self._packing.order[start:stop]]


class Pairs(_OfSequences, Dataset[tuple[Piece, Piece]]):
    """(chosen, rejected) a sample. Raises DataError as Padded does.

    lengths: int64 [P], the number of tokens of the longer side
    """

    def __init__(self, sequences: Sequences, max_length: int) -> None:
        self._sequences, self._pieces = sequences, _Pieces(sequences, "preferences", max_length)
        self.notes, self.lengths = self._pieces.notes, self._pieces.length.reshape(-1, 2).max(axis=1)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[Piece, Piece]:
        _check_index(index, len(self))
        chosen, rejected = (self._pieces.read(self._sequences, 2 * index + side) for side in (0, 1))
        return chosen, rejected


def collate(
    samples: Sequence[Piece] | Sequence[list[Piece]], pad_id: int, max_length: int | None = None
) -> dict[str, Tensor]:
    """Batch of samples of Padded or of Packed, padded on the right to the longest of them and a multiple of 16, but not
    beyond `max_length`, which may be all the positions that a model has.

    input_ids     [B, L] int64
    targets       [B, L] int64  the token that position l must predict, so nothing is to be shifted; IGNORE at the last
                                token of each piece, where the next token is not to be learned, and at padding
    position_ids  [B, L] int64  from 0 in each piece; 0 at padding
    document      [B, L] int64  of Packed only: the piece's number within its row, -1 at padding
    """
    rows = [[sample] if isinstance(sample, Piece) else sample for sample in samples]
    batch = _padded(rows, pad_id, max_length)
    if all(isinstance(sample, Piece) for sample in samples):
        del batch["document"]
    return batch


def collate_pairs(
    samples: Sequence[tuple[Piece, Piece]], pad_id: int, max_length: int | None = None
) -> dict[str, Tensor]:
    """Batch of samples of Pairs: input_ids, targets and position_ids of `collate`, [B, 2, L], chosen first."""
    batch = _padded([[side] for sample in samples for side in sample], pad_id, max_length)
    return {name: batch[name].unflatten(0, (-1, 2)) for name in ("input_ids", "targets", "position_ids")}


def _padded(rows: Sequence[list[Piece]], pad_id: int, max_length: int | None) -> dict[str, Tensor]:
    longest = max(sum(len(piece.tokens) for piece in row) for row in rows)
    length = -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
    shape = len(rows), length if max_length is None else max(longest, min(length, max_length))
    fills = {"input_ids": pad_id, "targets": IGNORE, "position_ids": 0, "document": -1}
    batch = {name: np.full(shape, fill, np.int64) for name, fill in fills.items()}
    for r, row in enumerate(rows):
        start = 0
        for number, (tokens, learned) in enumerate(row):
            stop = start + len(tokens)
            batch["input_ids"][r, start:stop] = tokens
            batch["targets"][r, start : stop - 1] = np.where(learned[1:], tokens[1:], IGNORE)
            batch["position_ids"][r, start:stop] = np.arange(len(tokens))
            batch["document"][r, start:stop] = number
            start = stop
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _check_index(index: int, length: int) -> None:
    if not 0 <= index < length:
        raise IndexError(f"sample {index} of {length}")
