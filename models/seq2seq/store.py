"""The prepared data set of an encoder-decoder: a trunkline.engine.data.store.ArrayStore of these arrays and files.

    {split}/inputs, {split}/input_offsets      ragged tokens: what the encoder reads
    {split}/targets, {split}/target_offsets    ragged tokens: what the decoder writes; absent for kind "text"
    tokenizer/                                 the Hugging Face tokenizer that made the tokens

Tokens are whole and without EOS, but for one between two turns of a talk (trunkline.models.seq2seq.turns); uint16, or
uint32 where the vocabulary needs it. Splits are "train", "val" and, where there is one, "test". store.json also says
what it was made from and what was left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trunkline.engine.data.npy import Spec
from trunkline.engine.data.store import ArrayStore
from trunkline.engine.errors import DataError
from trunkline.models.seq2seq.records import KINDS, Kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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


class Store(ArrayStore):
    """A whole, checked data set.

    Its facts: "kind" ("pairs" or "text"); "vocab_size", the tokenizer's, which ids are below; "splits", of each its
    SplitEntry.
    """

    workload = "seq2seq"
    prepare = "python launchers/prepare.py seq2seq --out"

    def __init__(self, root: Path, index: dict[str, Any]) -> None:
        super().__init__(root, index)
        self.kind: Kind = self.facts["kind"]
        self.vocab_size: int = self.facts["vocab_size"]
        self.entries = {name: SplitEntry(**entry) for name, entry in self.facts["splits"].items()}
        counts = [self.vocab_size, *(n for entry in self.entries.values() for n in vars(entry).values())]
        if any(type(count) is not int or not 0 <= count < 1 << 53 for count in counts):
            raise ValueError("a count that is none")
        if self.kind not in KINDS or not {"train", "val"} <= set(self.entries) <= {"train", "val", "test"}:
            raise ValueError("not a known kind, or not the splits train and val")
        held = {name: replace(spec, digest="") for name, spec in self.arrays.items()}
        if held != specs(self.kind, self.vocab_size, self.entries):
            raise ValueError("not the arrays of its kind")

    def inputs(self, split: str) -> Ragged:
        """What the encoder reads. Raises DataError for a split that is not there."""
        self._check(split)
        return Ragged(self, f"{split}/inputs")

    def targets(self, split: str) -> Ragged:
        """What the decoder writes; of pairs. Raises DataError for a split that is not there."""
        self._check(split)
        return Ragged(self, f"{split}/targets")

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that made the tokens."""
        from trunkline.models.text.tokenizer import load_tokenizer

        return load_tokenizer(self.root / "tokenizer")

    def _check(self, split: str) -> None:
        if split not in self.entries:
            raise DataError(f"{self.root}: no split {split!r}: use one of {', '.join(self.entries)}")


def token_dtype(vocab_size: int) -> str:
    """In which tokens are stored."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def specs(kind: Kind, vocab_size: int, entries: dict[str, SplitEntry]) -> dict[str, Spec]:
    """The arrays of a store with these counts, without digests."""
    found = {}
    for split, entry in entries.items():
        parts = {"input": entry.input_tokens} | ({"target": entry.target_tokens} if kind == "pairs" else {})
        for part, tokens in parts.items():
            offsets = f"{split}/{part}_offsets"
            found[f"{split}/{part}s"] = Spec(token_dtype(vocab_size), (tokens,), "", offsets)
            found[offsets] = Spec("<i8", (entry.samples + 1,), "", None)
    return found
