"""Writes a store (trunkline.models.causal_lm.store), so that a half-written one is never taken for whole.

    draft_of(out)                          the folder to write into, beside `out`
    StoreWriter(draft, kind, vocab_size)   .add(split, sequences of one record), then .finish(out, ...)

Everything is written into a draft folder, synced, and renamed to its name at the end; memory does not grow with the
number of sequences, but for 16 bytes each.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from trunkline.engine.errors import DataError
from trunkline.engine.machine.files import only_writer, sync
from trunkline.models.causal_lm.records import Kind
from trunkline.models.causal_lm.rendering import Rendered
from trunkline.models.causal_lm.store import (
    HEADER_BYTES,
    SPLITS,
    VERSION,
    Split,
    SplitEntry,
    Store,
    layout,
    npy_header,
    store_fingerprint,
    tokenizer_digests,
)


@contextmanager
def draft_of(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that nobody else writes; if it was not renamed, it is removed in the end.

    The lock goes with the process, however it ends. Raises DataError while another process holds it.
    """
    draft = out.with_name(f".{out.name}.draft")
    draft.mkdir(exist_ok=True)
    with only_writer(draft, out):
        try:
            for path in draft.iterdir():  # of a preparation that was killed
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)


class StoreWriter:
    """Writes into the folder `draft`, which must have no splits yet. Close it, or use it in a `with`."""

    def __init__(self, draft: Path, kind: Kind, vocab_size: int) -> None:
        self._draft, self._kind, self._vocab_size = draft, kind, vocab_size
        self._splits = {name: _SplitWriter(draft / name, kind, vocab_size) for name in SPLITS}

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for split in self._splits.values():
            split.close()

    def add(self, split: Split, sequences: Sequence[Rendered]) -> None:
        """One sequence, or chosen and rejected. Raises DataError for a token outside the vocabulary."""
        assert len(sequences) == (2 if self._kind == "preferences" else 1)
        for sequence in sequences:
            self._splits[split].add(sequence)

    def finish(self, out: Path, **notes: Any) -> Store:
        """Finish the files, take the tokenizer in `draft`/tokenizer as it is and rename the draft to `out`.

        `notes` go into store.json as they are. Raises DataError if `out` is there and not an empty folder.
        """
        entries: dict[str, SplitEntry] = {name: split.finish() for name, split in self._splits.items()}
        tokenizer = tokenizer_digests(self._draft / "tokenizer")
        index = {
            "version": VERSION,
            "kind": self._kind,
            "vocab_size": self._vocab_size,
            "fingerprint": store_fingerprint(self._kind, self._vocab_size, entries, tokenizer),
            "splits": {name: asdict(entry) for name, entry in entries.items()},
            "tokenizer": tokenizer,
            **notes,
        }
        for path in (self._draft / "tokenizer").iterdir():
            sync(path)
        with (self._draft / "store.json").open("w", encoding="utf-8") as file:
            file.write(json.dumps(index, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for folder in [self._draft / "tokenizer", *(self._draft / name for name in SPLITS), self._draft]:
            sync(folder)
        try:
            self._draft.rename(out)
        except OSError as error:
            raise DataError(f"{out}: {error.strerror}: choose another --out, or empty it") from error
        sync(out.parent)
        return Store.open(out)


class _SplitWriter:
    def __init__(self, folder: Path, kind: Kind, vocab_size: int) -> None:
        folder.mkdir()
        self._folder, self._kind, self._vocab_size = folder, kind, vocab_size
        self._names = layout(kind, vocab_size, 0, 0)
        self._offsets, self._first = array("q", [0]), array("q")
        self._learned = self._longest = 0
        self._files = {name: (folder / name).open("wb") for name in self._names}
        self._digests = {name: hashlib.sha256() for name in self._names}
        for file in self._files.values():
            file.write(bytes(HEADER_BYTES))  # the length is not known yet

    def add(self, sequence: Rendered) -> None:
        ids, learned = sequence
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._vocab_size:
            wrong = ids.min() if ids.min() < 0 else ids.max()
            raise DataError(
                f"the tokenizer gives token {wrong}, outside its vocabulary of {self._vocab_size}: it is damaged, "
                "or its files do not belong together; use another one"
            )
        self._write("tokens.npy", ids)
        if self._kind != "text":
            self._write("learned.npy", learned)
            targets = np.flatnonzero(learned[1:])
            self._first.append(int(targets[0]) + 1 if len(targets) else len(ids))
        self._offsets.append(self._offsets[-1] + len(ids))
        self._learned += int(learned.sum())
        self._longest = max(self._longest, len(ids))

    def finish(self) -> SplitEntry:
        self._write("offsets.npy", np.frombuffer(self._offsets, np.int64))
        if self._kind != "text":
            self._write("first.npy", np.array(self._first, np.int64))
        sequences, tokens = len(self._offsets) - 1, self._offsets[-1]
        for name, (dtype, length) in layout(self._kind, self._vocab_size, sequences, tokens).items():
            file = self._files[name]
            file.seek(0)
            file.write(npy_header(dtype, length))
            file.flush()
            os.fsync(file.fileno())
        self.close()
        digests = {name: digest.hexdigest() for name, digest in self._digests.items()}
        return SplitEntry(sequences, tokens, self._learned, self._longest, digests)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _write(self, name: str, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values, dtype=self._names[name][0]).tobytes()
        self._digests[name].update(data)
        self._files[name].write(data)
