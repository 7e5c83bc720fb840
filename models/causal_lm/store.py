"""The prepared data set of a language model: a TokenStore (trunkline.models.text) of these arrays and files.

    {train,val}/tokens    ragged: uint16, or uint32 where the vocabulary needs it
    {train,val}/learned   ragged: bool, the tokens that carry loss; absent for texts, all of which is learned
    {train,val}/offsets   int64 [N + 1], where each sequence begins, of both
    {train,val}/first     int64 [N], the first learned token that can be predicted (not the first token of the
                          sequence), or the sequence's length where there is none; absent for texts
    tokenizer/            the Hugging Face tokenizer that made the tokens

Kinds are those of records.py. The sequences of preferences come in pairs: 2i is chosen, 2i + 1 rejected.
store.json also says what it was made from and what was left out.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trunkline.engine.data.npy import Spec
from trunkline.engine.data.store import INDEX
from trunkline.engine.errors import DataError
from trunkline.models.causal_lm.records import KINDS, Kind
from trunkline.models.text.token_store import TokenStore, token_dtype

_COUNTED_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class SplitEntry:
    """Counts of a split: sequences, tokens, those that carry loss, and the tokens of the longest sequence."""

    sequences: int
    tokens: int
    learned: int
    longest: int


class Sequences:
    """Token sequences of one split. Safe to pickle: a copy opens the files for itself, when it first reads."""

    def __init__(self, store: Store, split: str) -> None:
        self._kind, self._vocab_size = store.kind, store.vocab_size
        self.arrays = {array: store[f"{split}/{array}"] for array in layout(store.kind, store.vocab_size)}
        self._tokens = self.arrays["tokens"]

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N], the number of tokens of each sequence."""
        return self._tokens.lengths

    @property
    def first_learned(self) -> np.ndarray:
        """int64 [N], the position of the first learned token after position 0, or the length where there is none."""
        return np.minimum(1, self.lengths) if self._kind == "text" else np.array(self.arrays["first"].map())

    def tokens(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """int64 [n], tokens start ... stop-1 of sequence `index`; all of it by default."""
        return self._tokens.item(index, start, stop).astype(np.int64)

    def loss_mask(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """bool [n], whether each of these tokens is to be learned; all are in texts."""
        if self._kind == "text":
            return np.ones(len(self._tokens.item(index, start, stop)), bool)
        return self.arrays["learned"].item(index, start, stop)

    def equal_pairs(self, max_length: int) -> np.ndarray:
        """bool [N/2], whether the first `max_length` tokens of sequences 2i and 2i + 1 are the same."""
        tokens, starts = self._tokens.map(), self.arrays["offsets"].map()[:-1]
        lengths = np.minimum(self.lengths, max_length)
        ends, equal = starts + lengths, lengths[0::2] == lengths[1::2]
        left, back = np.flatnonzero(equal), 0
        while len(left):  # from the end, where almost all differ at once
            back += 1
            left = left[equal[left] & (lengths[2 * left] >= back)]
            equal[left] = tokens[ends[2 * left] - back] == tokens[ends[2 * left + 1] - back]
        return equal

    def counts(self) -> np.ndarray:
        """int64 [vocabulary], how often each token stands in the split."""
        tokens, total = self._tokens, np.zeros(self._vocab_size, np.int64)
        size = tokens.spec.shape[0]
        for start in range(0, size, _COUNTED_AT_ONCE):
            some = tokens.rows(start, min(start + _COUNTED_AT_ONCE, size))
            total += np.bincount(some, minlength=self._vocab_size)
        return total


class Store(TokenStore):
    """A whole, checked data set, of kind "text", "conversations" or "preferences"."""

    workload = "causal_lm"
    prepare = "python launchers/prepare.py causal_lm --kind KIND --source FILES --tokenizer MODEL --out"
    kinds, entry = KINDS, SplitEntry
    kind: Kind
    entries: dict[str, SplitEntry]

    def split(self, name: str) -> Sequences:
        """The sequences of "train" or "val"; "val" may have none. Raises DataError for any other name."""
        self.check_split(name)
        return Sequences(self, name)

    def expected(self) -> dict[str, Spec]:
        """See TokenStore."""
        return specs(self.kind, self.vocab_size, self.entries, {})

    @classmethod
    def from_version_1(cls, root: Path, index: dict[str, Any]) -> dict[str, Any]:
        """That version kept the SHA-256 of each array's values, one after another."""
        kind, vocab_size, splits = index["kind"], index["vocab_size"], index["splits"]
        content = {name: index[name] for name in ("kind", "vocab_size", "splits", "tokenizer")}
        if hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest() != index["fingerprint"]:
            raise DataError(f"{root / INDEX}: changed since it was written: {cls._remedy(root)}")
        digests = {split: {name: f"sha256:{d}" for name, d in splits[split].pop("digests").items()} for split in splits}
        entries = {split: SplitEntry(**entry) for split, entry in splits.items()}
        return index | {
            "arrays": {name: spec.to_json() for name, spec in specs(kind, vocab_size, entries, digests).items()},
            "files": {f"tokenizer/{name}": digest for name, digest in index["tokenizer"].items()},
            "facts": {"kind": kind, "vocab_size": vocab_size, "splits": splits},
        }


def layout(kind: Kind, vocab_size: int) -> dict[str, str]:
    """dtype of each array of a split."""
    arrays = {"tokens": token_dtype(vocab_size), "offsets": "<i8"}
    return arrays if kind == "text" else arrays | {"learned": "|b1", "first": "<i8"}


def specs(
    kind: Kind, vocab_size: int, entries: dict[str, SplitEntry], digests: dict[str, dict[str, str]]
) -> dict[str, Spec]:
    """The arrays of a store with these counts; the digests are by split, then by file."""
    shapes = {
        split: {
            "offsets": entry.sequences + 1,
            "first": entry.sequences,
            "tokens": entry.tokens,
            "learned": entry.tokens,
        }
        for split, entry in entries.items()
    }
    return {
        f"{split}/{name}": Spec(
            dtype, (shapes[split][name],), digests.get(split, {}).get(f"{name}.npy", ""),
            f"{split}/offsets" if name in ("tokens", "learned") else None,
        )
        for split in entries for name, dtype in layout(kind, vocab_size).items()
    }  # fmt: skip
