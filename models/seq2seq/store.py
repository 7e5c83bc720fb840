"""The prepared data set of an encoder-decoder: a TokenStore (trunkline.models.text) of these arrays and files.

    {split}/inputs, {split}/input_offsets      ragged tokens: what the encoder reads
    {split}/targets, {split}/target_offsets    ragged tokens: what the decoder writes; absent for kind "text"
    tokenizer/                                 the Hugging Face tokenizer that made the tokens

Tokens are whole and without EOS, but for one between two turns of a talk (trunkline.models.seq2seq.turns); uint16, or
uint32 where the vocabulary needs it. Splits are "train", "val" and, where there is one, "test". store.json also says
what it was made from and what was left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trunkline.engine.data.npy import Spec
from trunkline.models.seq2seq.records import KINDS, Kind
from trunkline.models.text.token_store import TokenStore, token_dtype

_SCANNED = 1 << 24  # tokens at once


@dataclass(frozen=True)
class SplitEntry:
    """Counts of a split: samples, tokens of inputs and of targets."""

    samples: int
    input_tokens: int
    target_tokens: int


class Ragged:
    """Token sequences. Safe to pickle: a copy opens the files for itself, when it first reads."""

    def __init__(self, store: Store, name: str) -> None:
        self._values = store[name]
        self.arrays = [self._values, store[str(self._values.spec.offsets)]]

    def __len__(self) -> int:
        return len(self._values)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N], the number of tokens of each."""
        return self._values.lengths

    def tokens(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """int64 [n], tokens start ... stop-1 of sequence `index`; all of it by default."""
        return self._values.item(index, start, stop).astype(np.int64)

    def stretch(self, start: int, stop: int) -> np.ndarray:
        """int64 [n], the same where all sequences lie end to end."""
        return self._values.rows(start, stop).astype(np.int64)

    def places(self, token: int) -> np.ndarray:
        """int64 [n], where this token stands there."""
        held = self._values.map()
        some = [np.flatnonzero(held[at : at + _SCANNED] == token) + at for at in range(0, len(held), _SCANNED)]
        return np.concatenate([np.array([], np.int64), *some])


class Store(TokenStore):
    """A whole, checked data set, of kind "pairs" or "text"."""

    workload = "seq2seq"
    prepare = "python launchers/prepare.py seq2seq --out"
    kinds, entry, further = KINDS, SplitEntry, frozenset({"test"})
    kind: Kind
    entries: dict[str, SplitEntry]

    def inputs(self, split: str) -> Ragged:
        """What the encoder reads. Raises DataError for a split that is not there."""
        self.check_split(split)
        return Ragged(self, f"{split}/inputs")

    def targets(self, split: str) -> Ragged:
        """What the decoder writes; of pairs. Raises DataError for a split that is not there."""
        self.check_split(split)
        return Ragged(self, f"{split}/targets")

    def expected(self) -> dict[str, Spec]:
        """See TokenStore."""
        found = {}
        for split, entry in self.entries.items():
            parts = {"input": entry.input_tokens} | ({"target": entry.target_tokens} if self.kind == "pairs" else {})
            for part, tokens in parts.items():
                offsets = f"{split}/{part}_offsets"
                found[f"{split}/{part}s"] = Spec(token_dtype(self.vocab_size), (tokens,), "", offsets)
                found[offsets] = Spec("<i8", (entry.samples + 1,), "", None)
        return found
