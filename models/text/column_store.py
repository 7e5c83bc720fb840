"""Stores of records that are a few token sequences each, such as a prompt and its response.

    class Store(ColumnStore)            says its columns by kind, and its counts of a split
    store.column(split, "input")        the sequences of a column: Ragged
    ColumnWriter(draft, store, ...)     .add(split, input, target), then .finish(out, ...)

A column "input" of the split "train" is the ragged array train/inputs with the offsets train/input_offsets. Tokens are
uint16, or uint32 where the vocabulary needs it. Memory does not grow with the number of records, but for 8 bytes for
each sequence.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from trunkline.engine.data.npy import NpyWriter, Spec
from trunkline.models.text.token_store import TokenStore, check_tokens, publish_tokens, token_dtype

_SCANNED = 1 << 24  # tokens at once


class Ragged:
    """Token sequences. Safe to pickle: a copy opens the files for itself, when it first reads."""

    def __init__(self, store: ColumnStore, name: str) -> None:
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

    def counts(self, vocab_size: int) -> np.ndarray:
        """int64 [vocab_size], how often each token is there."""
        held, total = self._values.map(), np.zeros(vocab_size, np.int64)
        for at in range(0, len(held), _SCANNED):
            total += np.bincount(held[at : at + _SCANNED], minlength=vocab_size)
        return total


class ColumnStore(TokenStore):
    """`columns`: by kind, what a record consists of. `entry` counts samples, and of a column c its c_tokens."""

    columns: ClassVar[Mapping[str, tuple[str, ...]]]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.kinds = tuple(cls.columns)

    def column(self, split: str, name: str) -> Ragged:
        """The sequences of a column. Raises DataError for a split that is not there."""
        self.check_split(split)
        return Ragged(self, f"{split}/{name}s")

    def expected(self) -> dict[str, Spec]:
        """See TokenStore."""
        found = {}
        for split, entry in self.entries.items():
            for name in self.columns[self.kind]:
                offsets = f"{split}/{name}_offsets"
                tokens = getattr(entry, f"{name}_tokens")
                found[f"{split}/{name}s"] = Spec(token_dtype(self.vocab_size), (tokens,), "", offsets)
                found[offsets] = Spec("<i8", (entry.samples + 1,), "", None)
        return found


_S = TypeVar("_S", bound=ColumnStore)


class ColumnWriter(Generic[_S]):
    """Writes into the folder `draft`, which must have no splits yet. Close it, or use it in a `with`."""

    def __init__(self, draft: Path, store: type[_S], kind: str, vocab_size: int, splits: Sequence[str]) -> None:
        self._draft, self._store, self._kind, self._vocab_size = draft, store, kind, vocab_size
        self._files = ExitStack()
        columns, dtype = store.columns[kind], token_dtype(vocab_size)
        self._splits = {split: _SplitWriter(draft / split, columns, dtype, self._files) for split in splits}

    def __enter__(self) -> ColumnWriter[_S]:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def add(self, split: str, *sequences: Sequence[int]) -> None:
        """One record's tokens, column by column. Raises DataError for one outside the vocabulary."""
        arrays = [np.asarray(ids, np.int64) for ids in sequences]
        for ids in arrays:
            check_tokens(ids, self._vocab_size)
        self._splits[split].add(arrays)

    def finish(self, out: Path, **notes: Any) -> _S:
        """Finish the files, take the tokenizer in `draft`/tokenizer as it is and rename the draft to `out`.

        `notes` go into store.json as they are. Raises DataError if `out` is there and not an empty folder.
        """
        arrays: dict[str, Spec] = {}
        entries = {}
        for split, writer in self._splits.items():
            specs, counts = writer.finish(split)
            arrays |= specs
            entries[split] = self._store.entry(**counts)
        return publish_tokens(self._draft, out, self._store, self._kind, self._vocab_size, arrays, entries, notes)


class _SplitWriter:
    def __init__(self, folder: Path, columns: Sequence[str], dtype: str, files: ExitStack) -> None:
        folder.mkdir()
        self._tokens = {name: files.enter_context(NpyWriter(folder / f"{name}s.npy", dtype)) for name in columns}
        self._where = {name: files.enter_context(NpyWriter(folder / f"{name}_offsets.npy", "<i8")) for name in columns}
        self._offsets = {name: array("q", [0]) for name in columns}

    def add(self, sequences: Sequence[np.ndarray]) -> None:
        for name, ids in zip(self._tokens, sequences, strict=True):
            self._tokens[name].add(ids)
            self._offsets[name].append(self._offsets[name][-1] + len(ids))

    def finish(self, split: str) -> tuple[dict[str, Spec], dict[str, int]]:
        specs: dict[str, Spec] = {}
        counts: dict[str, int] = {}
        for name, offsets in self._offsets.items():
            self._where[name].add(np.frombuffer(offsets, np.int64))
            specs[f"{split}/{name}_offsets"] = self._where[name].finish()
            specs[f"{split}/{name}s"] = self._tokens[name].finish(f"{split}/{name}_offsets")
            counts |= {"samples": len(offsets) - 1, f"{name}_tokens": offsets[-1]}
        return specs, counts
