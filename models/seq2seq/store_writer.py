"""Writes the data set of trunkline.models.seq2seq.store into a draft, which is renamed when it is whole.

    StoreWriter(draft, kind, vocab_size, splits)   .add(split, input, target), then .finish(out, ...)

Memory does not grow with the number of records, but for 16 bytes each.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from trunkline.engine.data.npy import NpyWriter, Spec
from trunkline.models.seq2seq.records import Kind
from trunkline.models.seq2seq.store import SplitEntry, Store
from trunkline.models.text.token_store import check_tokens, publish_tokens, token_dtype


class StoreWriter:
    """Writes into the folder `draft`, which must have no splits yet. Close it, or use it in a `with`."""

    def __init__(self, draft: Path, kind: Kind, vocab_size: int, splits: Sequence[str]) -> None:
        self._draft, self._kind, self._vocab_size = draft, kind, vocab_size
        self._files = ExitStack()
        self._splits = {split: _SplitWriter(draft / split, kind, vocab_size, self._files) for split in splits}

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def add(self, split: str, source: Sequence[int], target: Sequence[int] = ()) -> None:
        """One record's tokens, without the EOS of either side. Raises DataError for one outside the vocabulary."""
        check_tokens(source, self._vocab_size)
        check_tokens(target, self._vocab_size)
        self._splits[split].add(source, target)

    def finish(self, out: Path, **notes: Any) -> Store:
        """Finish the files, take the tokenizer in `draft`/tokenizer as it is and rename the draft to `out`.

        `notes` go into store.json as they are. Raises DataError if `out` is there and not an empty folder.
        """
        arrays: dict[str, Spec] = {}
        entries = {}
        for split, writer in self._splits.items():
            specs, entries[split] = writer.finish(split)
            arrays |= specs
        return publish_tokens(self._draft, out, Store, self._kind, self._vocab_size, arrays, entries, notes)


class _SplitWriter:
    def __init__(self, folder: Path, kind: Kind, vocab_size: int, files: ExitStack) -> None:
        folder.mkdir()
        self._parts = ("input", "target") if kind == "pairs" else ("input",)
        dtype = token_dtype(vocab_size)
        self._tokens = {part: files.enter_context(NpyWriter(folder / f"{part}s.npy", dtype)) for part in self._parts}
        self._where = {
            part: files.enter_context(NpyWriter(folder / f"{part}_offsets.npy", "<i8")) for part in self._parts
        }
        self._offsets = {part: array("q", [0]) for part in self._parts}

    def add(self, *sides: Sequence[int]) -> None:
        for part, ids in zip(self._parts, sides):
            self._tokens[part].add(np.asarray(ids, np.int64))
            self._offsets[part].append(self._offsets[part][-1] + len(ids))

    def finish(self, split: str) -> tuple[dict[str, Spec], SplitEntry]:
        specs = {}
        for part in self._parts:
            self._where[part].add(np.frombuffer(self._offsets[part], np.int64))
            specs[f"{split}/{part}_offsets"] = self._where[part].finish()
            specs[f"{split}/{part}s"] = self._tokens[part].finish(f"{split}/{part}_offsets")
        totals = [self._offsets[part][-1] for part in self._parts]
        samples = len(self._offsets["input"]) - 1
        return specs, SplitEntry(samples, totals[0], totals[1] if len(totals) > 1 else 0)
