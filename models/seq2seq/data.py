"""Samples for training, and how they become batches.

    PairRows(store, data, pad_id, eos_id)     .dataset(split), one of the next two, and .collate(samples)
    PairSamples(store, split, data, eos_id)   a prompt and a response a sample, each cut by token, its EOS kept
    PackedPairs(pairs, room)                  a row of these a sample, as many as fit
    collate(rows, pad_id, room)               the batch

A batch of pairs, N and M the longest row's tokens rounded up to a multiple of 8, but no more than a row has room for:

    input_ids          [B, N] int64  what the encoder reads, PAD behind it
    input_document     [B, N] int64  the number of the sample within its row, counted from 0, -1 at padding
    decoder_input_ids  [B, M] int64  PAD (the start), then the targets but for the last
    targets            [B, M] int64  what the decoder writes; IGNORE at padding
    target_document    [B, M] int64  as input_document
    number             [B] int64     of a sample that a text is generated for, counted from 0, or -1
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trunkline.engine.data.store import Array
from trunkline.engine.errors import DataError, MissingDataError
from trunkline.models.seq2seq.config import Seq2SeqData
from trunkline.models.seq2seq.packing import Room, choose_room, pack
from trunkline.models.seq2seq.store import Store
from trunkline.models.seq2seq.turns import kept_from
from trunkline.models.text.linear_loss import IGNORE

LENGTH_MULTIPLE = 8  # few different shapes of batches


class Pair(NamedTuple):
    """int64 [n] and [m], both with EOS at their end; and its number among those that texts are generated for, or -1."""

    input: np.ndarray
    target: np.ndarray
    number: int = -1


class PairRows:
    """How samples are made of a store of pairs, and batches of samples.

    room: tokens of a row. Where packing leaves it open ("auto"), it is what the training pairs fill best.
    cut: the same in words; notes: for a person to read
    """

    def __init__(self, store: Store, data: Seq2SeqData, pad_id: int, eos_id: int, generated: int = 0) -> None:
        self._store, self._data, self._pad, self._eos, self._generated = store, data, pad_id, eos_id, generated
        self.room, self.notes = Room(data.max_source_length, data.max_target_length), list[str]()
        self.cut = f"{self.room.source} and {self.room.target}"
        if data.packing:
            source, target = given = [
                None if most == "auto" else most for most in (data.packed_source_length, data.packed_target_length)
            ]
            if source is not None and target is not None:
                self.room = Room(source, target)
            else:
                try:
                    sides = PairSamples(store, "train", data, eos_id).sides
                except MissingDataError:  # of a plan without data: the longest pair stands for all
                    sides = np.array([self.room])
                self.room = choose_room(sides, source, target)
            self.cut += f" packed in {self.room.source} and {self.room.target}"
            self.notes = [
                f"data.packed_source_length = {self.room.source}, data.packed_target_length = {self.room.target}"
            ] * (None in given)

    def dataset(self, split: str) -> PairSamples | PackedPairs:
        """A pair a sample, or of packed "train" a row of several: elsewhere a text is generated for each pair."""
        pairs = PairSamples(self._store, split, self._data, self._eos, self._generated)
        return PackedPairs(pairs, self.room) if self._data.packing and split == "train" else pairs

    def largest(self) -> Pair:
        """A row with no room left."""
        return Pair(np.zeros(self.room.source, np.int64), np.zeros(self.room.target, np.int64))

    def sides(self, split: str) -> np.ndarray:
        """int64 [P, 2], tokens of encoder and decoder of each pair, packed or not."""
        return PairSamples(self._store, split, self._data, self._eos).sides

    def collate(self, samples: Sequence[Pair] | Sequence[list[Pair]]) -> dict[str, Tensor]:
        """The batch of these samples. See the top of this file."""
        rows = [[sample] if isinstance(sample, Pair) else sample for sample in samples]
        return collate(rows, self._pad, self.room)


class PairSamples(Dataset[Pair]):
    """One pair a sample. Raises DataError for a split that is not there or empty.

    lengths: int64 [P], tokens of input and target together, as they are cut
    sides: int64 [P, 2], of each
    generated: how many evenly spaced ones are numbered, to generate texts for
    notes: what was cut, for a person to read
    """

    def __init__(self, store: Store, split: str, data: Seq2SeqData, eos_id: int, generated: int = 0) -> None:
        self._inputs, self._targets, self._eos = store.column(split, "input"), store.column(split, "target"), eos_id
        self._most = data.max_source_length, data.max_target_length
        if not len(self._inputs):
            raise DataError(f"{store.root}: the split {split} is empty: prepare other data")
        source, target = self._inputs.lengths, self._targets.lengths
        longer = source >= self._most[0]
        ends = self._inputs.places(eos_id) if longer.any() else np.array([], np.int64)
        self._first = kept_from(source, ends, self._most[0])
        left = source - self._first + 1, target + 1
        self.sides = np.stack([np.minimum(side, most) for side, most in zip(left, self._most, strict=True)], axis=1)
        self.lengths = self.sides.sum(axis=1)
        count = min(generated, len(source))
        self._numbers = np.full(len(source), -1)
        self._numbers[np.arange(count) * len(source) // max(count, 1)] = np.arange(count)
        keys, whats = ("max_source_length", "max_target_length"), ("prompts", "responses")
        self.notes = [
            f"{(side > most).sum():,} of {len(side):,} {what} are longer than data.{key} = {most} and cut off on "
            f"the right; {np.maximum(side - most, 0).sum():,} tokens are lost"
            for side, most, what, key in zip(left, self._most, whats, keys, strict=True)
            if (side > most).any()
        ]
        if (shortened := self._first > 0).any():
            self.notes.append(
                f"{shortened.sum():,} of {len(source):,} talks are longer than data.max_source_length = "
                f"{self._most[0]} and lose their oldest turns; {self._first.sum():,} tokens are lost"
            )

    @property
    def arrays(self) -> list[Array]:
        """What is read of the store."""
        return [*self._inputs.arrays, *self._targets.arrays]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Pair:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        first, (source, target) = int(self._first[index]), self._most
        parts = self._inputs.tokens(index, first, first + source - 1), self._targets.tokens(index, 0, target - 1)
        prompt, response = (np.append(part, self._eos) for part in parts)
        return Pair(prompt, response, int(self._numbers[index]))


class PackedPairs(Dataset[list[Pair]]):
    """A row of pairs a sample, within the room of a row.

    lengths: int64 [R], tokens of each row
    """

    def __init__(self, pairs: PairSamples, room: Room) -> None:
        self._pairs, self._packing = pairs, pack(pairs.sides, room)
        self.lengths = np.add.reduceat(pairs.lengths[self._packing.order], self._packing.row_starts[:-1])
        full = self.lengths.sum() / (len(self.lengths) * sum(room))
        self.notes = [
            *pairs.notes,
            f"{len(pairs):,} pairs are packed into {len(self):,} rows of {room.source} + {room.target} tokens, "
            f"{full:.1%} full",
        ]

    @property
    def arrays(self) -> list[Array]:
        """What is read of the store."""
        return self._pairs.arrays

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> list[Pair]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start, stop = self._packing.row_starts[index : index + 2]
        return [self._pairs[int(pair)] for pair in self._packing.order[start:stop]]


def collate(rows: Sequence[Sequence[Pair]], pad_id: int, room: Room) -> dict[str, Tensor]:
    """The batch of these rows, each of one pair or several. See the top of this file."""
    sides = [[pair.input for pair in row] for row in rows], [[pair.target for pair in row] for row in rows]
    (inputs, input_document), (targets, target_document) = (
        _padded(side, most) for side, most in zip(sides, room, strict=True)
    )
    first = np.diff(target_document, prepend=-1, axis=1) != 0  # of each sample's targets
    before = np.where(first, pad_id, np.roll(targets, 1, axis=1))
    batch = {
        "input_ids": np.where(input_document < 0, pad_id, inputs),
        "input_document": input_document,
        "decoder_input_ids": np.where(target_document < 0, pad_id, before),
        "targets": np.where(target_document < 0, IGNORE, targets),
        "target_document": target_document,
        "number": np.array([row[0].number for row in rows]),
    }
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def padded_length(longest: int, most: int) -> int:
    """How long the rows of a batch are whose longest has `longest` tokens, `most` at most."""
    return max(longest, min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, most))


def _padded(rows: Sequence[Sequence[np.ndarray]], most: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and numbers of documents, int64 [B, L]."""
    length = padded_length(max(sum(map(len, row)) for row in rows), most)
    tokens, document = np.zeros((len(rows), length), np.int64), np.full((len(rows), length), -1)
    for r, row in enumerate(rows):
        start = 0
        for number, part in enumerate(row):
            tokens[r, start : start + len(part)] = part
            document[r, start : start + len(part)] = number
            start += len(part)
    return tokens, document
