"""Texts for span corruption, in pieces of one length, and how they become batches.

    TextPieces(store, data, objective, ...)   .dataset(split), .collate(pieces)
    Texts(store, split, length, ...)          a piece a sample: int64 [l]

A text that is too long is cut into pieces. Where texts are joined (data.packing), T5's way, all follow one another, EOS
between them, and are cut without regard to where one ends.

A batch of texts, which trunkline.models.seq2seq.span_corruption completes on the device. What becomes of a text is
known, but for which tokens are noise:

    texts            [B, T] int64  PAD behind each; T is no less than N and M
    length           [B] int64     tokens of each text, and of them
    noise, spans     [B] int64     those that are taken out, and the runs that these make
    sentinels        [B, S] int64  what stands for span 0, 1, ...
    input_document   [B, N] int64  0 where the encoder will read a token, -1 at padding
    target_document  [B, M] int64  0 where the decoder will write one
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from trunkline.engine.data.store import Array
from trunkline.engine.errors import ConfigError, DataError
from trunkline.models.seq2seq.config import Seq2SeqData, SpanCorruption
from trunkline.models.seq2seq.data import padded_length
from trunkline.models.seq2seq.span_corruption import Counts, counts, longest_text
from trunkline.models.seq2seq.store import Store


class TextPieces:
    """How samples are made of a store of texts, `length` tokens each, and batches of samples.

    sentinels: what stands for span 0, 1, ...
    cut: the same in words; notes: for a person to read

    Raises ConfigError for limits that leave no text, and for too few sentinels.
    """

    def __init__(
        self, store: Store, data: Seq2SeqData, objective: SpanCorruption, pad_id: int, eos_id: int,
        sentinels: Sequence[int],
    ) -> None:  # fmt: skip
        self._store, self._data, self._objective = store, data, objective
        self._pad, self._eos = pad_id, eos_id
        for side in ("source", "target"):
            if getattr(data, f"packed_{side}_length") != "auto":
                raise ConfigError(
                    f"data.packed_{side}_length: texts are cut to fill data.max_{side}_length: leave it out"
                )
        self.length = longest_text(data, objective)
        if not self.length:
            raise ConfigError(
                f"data.max_source_length {data.max_source_length}, data.max_target_length {data.max_target_length}: no "
                "text from which a span is taken out fits: use 3 or more for both"
            )
        most = counts(self.length, objective)
        if len(sentinels) < most.spans:
            raise ConfigError(
                f"data.store: {data.store}: from a text of {self.length} tokens {most.spans} spans are taken out, but "
                f"there are {len(sentinels)} sentinels (<extra_id_0>, ...; where the tokenizer has none, the model's "
                "ids above its own): lower data.max_source_length, raise model.objective.mean_span_length, or prepare "
                "the data with a tokenizer that has more"
            )
        self._sentinels = list(sentinels[: most.spans])
        self.cut = f"{self.length}{' joined' if data.packing else ''}"
        self.notes = [
            f"span corruption: of {self.length} tokens {most.noise} are taken out in {most.spans} spans, which leaves "
            f"{most.input} for the encoder and gives the decoder {most.target}; the sentinels are "
            f"{', '.join(map(str, self._sentinels[:3]))}{', ...' * (most.spans > 3)}"
        ]

    def dataset(self, split: str) -> Texts:
        """The pieces of a split."""
        return Texts(self._store, split, self.length, self._eos, self._data.packing)

    def largest(self) -> np.ndarray:
        """A whole piece."""
        return np.zeros(self.length, np.int64)

    def sides(self, split: str) -> np.ndarray:
        """int64 [P, 2], tokens of encoder and decoder of each piece."""
        sizes, where = np.unique(self.dataset(split).lengths, return_inverse=True)
        found = [counts(int(size), self._objective) for size in sizes]
        return np.array([(of.input, of.target) for of in found])[where]

    def collate(self, pieces: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """The batch of these pieces. See the top of this file."""
        found = [counts(len(piece), self._objective) for piece in pieces]
        documents = [
            np.where(np.arange(padded_length(max(sides), most)) < np.array(sides)[:, None], 0, -1)
            for sides, most in (
                ([of.input for of in found], self._data.max_source_length),
                ([of.target for of in found], self._data.max_target_length),
            )
        ]
        width = max([len(piece) for piece in pieces] + [document.shape[1] for document in documents])
        texts = np.full((len(pieces), width), self._pad)
        for row, piece in zip(texts, pieces, strict=True):
            row[: len(piece)] = piece
        sentinels = self._sentinels[: max(of.spans for of in found)]
        batch = dict(zip(Counts._fields, np.array(found).T.copy(), strict=True)) | {
            "texts": texts,
            "sentinels": np.tile(sentinels, (len(pieces), 1)),
            "input_document": documents[0],
            "target_document": documents[1],
        }
        return {name: torch.from_numpy(array) for name, array in batch.items()}


class Texts(Dataset[np.ndarray]):
    """One piece of `length` tokens or less a sample. Raises DataError for a split that is not there or has none.

    lengths: int64 [P], tokens of each
    notes: what was cut and left out, for a person to read
    """

    def __init__(self, store: Store, split: str, length: int, eos_id: int, joined: bool) -> None:
        self._texts, self._eos, self._joined = store.column(split, "input"), eos_id, joined
        texts = self._texts.lengths
        self._ends = np.cumsum(texts + 1)  # of each text and its EOS, where all are joined
        whole = np.array([texts.sum() + max(len(texts) - 1, 0)]) if joined else texts
        pieces = -(-whole // length)
        number = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        start = np.repeat(np.cumsum(whole) - whole, pieces) + number * length
        size = np.minimum(np.repeat(np.cumsum(whole), pieces) - start, length)
        used = size > 1
        self._start, self.lengths = start[used], size[used]
        if not len(self.lengths):
            raise DataError(f"{store.root}: the split {split} holds no text of two tokens or more: prepare other data")
        longer = texts > length
        self.notes = [f"{len(texts):,} texts are joined and cut into {len(size):,} pieces of {length} tokens"] * joined
        if longer.any() and not joined:
            self.notes.append(
                f"{longer.sum():,} of {len(texts):,} texts are longer than {length} tokens and cut into "
                f"{pieces[longer].sum():,} pieces"
            )
        if not used.all():
            self.notes.append(f"{(~used).sum():,} pieces of a single token, which cannot lose a span, are left out")

    @property
    def arrays(self) -> list[Array]:
        """What is read of the store."""
        return self._texts.arrays

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start = int(self._start[index])
        stop = start + int(self.lengths[index])
        if not self._joined:
            return self._texts.stretch(start, stop)
        before, upto = np.searchsorted(self._ends, (start, stop), side="right").tolist()  # EOS before either place
        places = self._ends[before:upto] - 1 - start
        return np.insert(self._texts.stretch(start - before, stop - upto), places - np.arange(len(places)), self._eos)
