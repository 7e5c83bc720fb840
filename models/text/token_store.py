"""What prepared data sets of tokens have in common: a kind, a vocabulary, splits with their counts, and a tokenizer.

class Store(TokenStore)      says its kinds, its counts of a split and the arrays that these ask for
publish_tokens(draft, ...)   writes the index of a draft that has its arrays and tokenizer, and gives it its name
check_tokens(ids, size)      raises for a token that the vocabulary does not have
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from trunkline.engine.data.npy import Spec
from trunkline.engine.data.store import ArrayStore
from trunkline.engine.data.store_writer import publish, write_index
from trunkline.engine.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_S = TypeVar("_S", bound="TokenStore")


class TokenStore(ArrayStore):
    """A whole, checked data set.

    Its facts: "kind", one of `kinds`; "vocab_size", the tokenizer's, which ids are below; "splits", of each the counts
    of an `entry`. There are the splits "train" and "val", and those of `further`, or not.
    """

    kinds: ClassVar[tuple[str, ...]]
    entry: ClassVar[type[Any]]
    further: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, root: Path, index: dict[str, Any]) -> None:
        super().__init__(root, index)
        self.kind: Any = self.facts["kind"]
        self.vocab_size: int = self.facts["vocab_size"]
        self.entries: dict[str, Any] = {name: self.entry(**counts) for name, counts in self.facts["splits"].items()}
        counts = [self.vocab_size, *(n for entry in self.entries.values() for n in vars(entry).values())]
        if any(type(count) is not int or not 0 <= count < 1 << 53 for count in counts):
            raise ValueError("a count that is none")
        if self.kind not in self.kinds or not {"train", "val"} <= set(self.entries) <= {"train", "val"} | self.further:
            raise ValueError("not a known kind, or not the splits train and val")
        if {name: replace(spec, digest="") for name, spec in self.arrays.items()} != self.expected():
            raise ValueError("not the arrays of its kind")

    @abstractmethod
    def expected(self) -> dict[str, Spec]:
        """The arrays of a store with these counts, without digests."""

    def check_split(self, name: str) -> None:
        """Raises DataError for a split that is not there."""
        if name not in self.entries:
            raise DataError(f"{self.root}: no split {name!r}: use one of {', '.join(self.entries)}")

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that made the tokens."""
        from trunkline.models.text.tokenizer import load_tokenizer

        return load_tokenizer(self.root / "tokenizer")


def publish_tokens(
    draft: Path, out: Path, store: type[_S], kind: str, vocab_size: int, arrays: Mapping[str, Spec],
    entries: Mapping[str, Any], notes: Mapping[str, Any],
) -> _S:  # fmt: skip
    """Write store.json, with `notes` as they are, take the tokenizer in `draft`/tokenizer as it is, and rename.

    Raises DataError if `out` is there and not an empty folder.
    """
    files = [str(path.relative_to(draft)) for path in (draft / "tokenizer").rglob("*") if path.is_file()]
    splits = {split: vars(entry) for split, entry in entries.items()}
    write_index(draft, store.workload, arrays, files, {"kind": kind, "vocab_size": vocab_size, "splits": splits}, notes)
    publish(draft, out)
    return store.open(out)


def token_dtype(vocab_size: int) -> str:
    """In which tokens are stored."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


def check_tokens(ids: Sequence[int] | np.ndarray, vocab_size: int) -> None:
    """Raises DataError for a token outside of the vocabulary."""
    if len(ids) and not 0 <= (low := np.min(ids)) <= (high := np.max(ids)) < vocab_size:
        wrong = low if low < 0 else high
        raise DataError(
            f"the tokenizer gives token {wrong}, outside its vocabulary of {vocab_size}: it is damaged, or its files "
            "do not belong together; use another one"
        )
