"""Writes the data set of trunkline.models.causal_lm.store into a draft, which is renamed when it is whole.

    StoreWriter(draft, kind, vocab_size)   .add(split, sequences of one record), then .finish(out, ...)

Memory does not grow with the number of sequences, but for 16 bytes each.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from trunkline.engine.data.npy import NpyWriter, Spec
from trunkline.models.causal_lm.records import Kind
from trunkline.models.causal_lm.rendering import Rendered
from trunkline.models.causal_lm.store import SplitEntry, Store, layout
from trunkline.models.text.splits import Split
from trunkline.models.text.token_store import check_tokens, publish_tokens


class StoreWriter:
    """Writes into the folder `draft`, which must have no splits yet. Close it, or use it in a `with`."""

    def __init__(self, draft: Path, kind: Kind, vocab_size: int) -> None:
        self._draft, self._kind, self._vocab_size = draft, kind, vocab_size
        self._files = ExitStack()
        self._splits = {name: _SplitWriter(draft / name, kind, vocab_size, self._files) for name in ("train", "val")}

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def add(self, split: Split, sequences: Sequence[Rendered]) -> None:
        """One sequence, or chosen and rejected. Raises DataError for a token outside the vocabulary."""
        assert len(sequences) == (2 if self._kind == "preferences" else 1)
        for sequence in sequences:
            self._splits[split].add(sequence)

    def finish(self, out: Path, **notes: Any) -> Store:
        """Finish the files, take the tokenizer in `draft`/tokenizer as it is and rename the draft to `out`.

        `notes` go into store.json as they are. Raises DataError if `out` is there and not an empty folder.
        """
        arrays: dict[str, Spec] = {}
        entries: dict[str, SplitEntry] = {}
        for name, writer in self._splits.items():
            specs, entries[name] = writer.finish(f"{name}/offsets")
            arrays |= {f"{name}/{array}": spec for array, spec in specs.items()}
        return publish_tokens(self._draft, out, Store, self._kind, self._vocab_size, arrays, entries, notes)


class _SplitWriter:
    def __init__(self, folder: Path, kind: Kind, vocab_size: int, files: ExitStack) -> None:
        folder.mkdir()
        self._vocab_size, self._learned, self._longest = vocab_size, 0, 0
        self._offsets, self._first = array("q", [0]), array("q")
        self._arrays = {
            name: files.enter_context(NpyWriter(folder / f"{name}.npy", dtype))
            for name, dtype in layout(kind, vocab_size).items()
        }

    def add(self, sequence: Rendered) -> None:
        ids, learned = sequence
        check_tokens(ids, self._vocab_size)
        self._arrays["tokens"].add(ids)
        if "learned" in self._arrays:
            self._arrays["learned"].add(learned)
            targets = np.flatnonzero(learned[1:])
            self._first.append(int(targets[0]) + 1 if len(targets) else len(ids))
        self._offsets.append(self._offsets[-1] + len(ids))
        self._learned += int(learned.sum())
        self._longest = max(self._longest, len(ids))

    def finish(self, offsets: str) -> tuple[dict[str, Spec], SplitEntry]:
        self._arrays["offsets"].add(np.frombuffer(self._offsets, np.int64))
        if "first" in self._arrays:
            self._arrays["first"].add(np.array(self._first, np.int64))
        specs = {
            name: writer.finish(offsets if name in ("tokens", "learned") else None)
            for name, writer in self._arrays.items()
        }
        return specs, SplitEntry(len(self._offsets) - 1, self._offsets[-1], self._learned, self._longest)
