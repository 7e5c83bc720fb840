"""Store: a prepared data set of token sequences on disk, read through memory maps.

    DIR/store.json      what it holds, its fingerprint, what it was made from and what was left out
    DIR/tokenizer/      the Hugging Face tokenizer that made the tokens
    DIR/{train,val}/    tokens.npy   uint16, or uint32 where the vocabulary needs it; all sequences, one after another
                        offsets.npy  int64 [N + 1], where each begins
                        learned.npy  bool, the tokens that carry loss; absent for texts, all of which is learned
                        first.npy    int64 [N], the first learned token that can be predicted (not the first token of
                                     the sequence), or the sequence's length where there is none; absent for texts

Kinds are those of records.py. The sequences of preferences come in pairs: 2i is chosen, 2i + 1 rejected.
A store is written under another name (trunkline.models.causal_lm.store_writer) and renamed, so what is there is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from trunkline.engine.errors import DataError
from trunkline.engine.machine.reading import read_object, reason
from trunkline.models.causal_lm.records import KINDS, Kind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VERSION = 1
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = get_args(Split)
HEADER_BYTES = 128
_MAX_JSON_BYTES = 64 << 20
_PREPARE = "python launchers/prepare.py causal_lm --out"


@dataclass(frozen=True)
class SplitEntry:
    """What store.json says of a split. digests: SHA-256 of the values in each of its files, by the file's name."""

    sequences: int
    tokens: int
    learned: int
    longest: int
    digests: dict[str, str]

    @property
    def counts(self) -> tuple[int, int, int, int]:
        return self.sequences, self.tokens, self.learned, self.longest


_COUNTED_AT_ONCE = 1 << 24


class Sequences:
    """Token sequences of one split. Safe to pickle: a copy opens the files for itself, when it first reads."""

    def __init__(self, folder: Path, kind: Kind, vocab_size: int, entry: SplitEntry) -> None:
        self._folder, self._kind, self._vocab_size, self._entry = folder, kind, vocab_size, entry
        self._maps: dict[str, np.ndarray] = {}

    def __reduce__(self) -> tuple[Callable[..., Sequences], tuple[Any, ...]]:
        return Sequences, (self._folder, self._kind, self._vocab_size, self._entry)

    def __len__(self) -> int:
        return self._entry.sequences

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N], the number of tokens of each sequence."""
        return np.diff(self._map("offsets.npy"))

    @property
    def first_learned(self) -> np.ndarray:
        """int64 [N], the position of the first learned token after position 0, or the length where there is none."""
        return np.minimum(1, self.lengths) if self._kind == "text" else np.array(self._map("first.npy"))

    def tokens(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """int64 [n], tokens start ... stop-1 of sequence `index`; all of it by default."""
        return self._slice("tokens.npy", index, start, stop).astype(np.int64)

    def loss_mask(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """bool [n], whether each of these tokens is to be learned; all are in texts."""
        if self._kind == "text":
            return np.ones(len(self._slice("tokens.npy", index, start, stop)), bool)
        return self._slice("learned.npy", index, start, stop).copy()

    def equal_pairs(self, max_length: int) -> np.ndarray:
        """bool [N/2], whether the first `max_length` tokens of sequences 2i and 2i + 1 are the same."""
        tokens, starts = self._map("tokens.npy"), self._map("offsets.npy")[:-1]
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
        tokens, total = self._map("tokens.npy"), np.zeros(self._vocab_size, np.int64)
        for start in range(0, len(tokens), _COUNTED_AT_ONCE):
            total += np.bincount(tokens[start : start + _COUNTED_AT_ONCE], minlength=self._vocab_size)
        return total

    def check_files(self) -> None:
        """Raises DataError unless every file is there with the size and layout that was written."""
        for name, (dtype, length) in self._layout().items():
            path = self._folder / name
            expected = HEADER_BYTES + np.dtype(dtype).itemsize * length
            found = path.stat().st_size if path.is_file() else None
            if found != expected:
                what = "is missing" if found is None else f"has {found} bytes where {expected} were written"
                raise DataError(f"{path}: {what}: {again(self._folder.parent)}")
            with path.open("rb") as file:
                if file.read(HEADER_BYTES) != npy_header(dtype, length):
                    raise DataError(f"{path}: damaged (not {dtype} [{length}]): {again(self._folder.parent)}")
        offsets = self._map("offsets.npy")
        if offsets[0] != 0 or offsets[-1] != self._entry.tokens or (np.diff(offsets) < 0).any():
            raise DataError(f"{self._folder / 'offsets.npy'}: damaged: {again(self._folder.parent)}")

    def verify(self) -> None:
        """Read every value and compare it with its digest. Raises DataError naming the first file that differs."""
        for name, digest in self._entry.digests.items():
            if values_digest(self._folder / name) != digest:
                raise DataError(f"{self._folder / name}: its bytes changed: {again(self._folder.parent)}")

    def _slice(self, name: str, index: int, start: int, stop: int | None) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        begin, end = self._map("offsets.npy")[index : index + 2].tolist()
        return self._map(name)[begin + start : end if stop is None else min(end, begin + stop)]

    def _map(self, name: str) -> np.ndarray:
        if name not in self._maps:
            dtype, length = self._layout()[name]
            if length == 0:  # an empty file cannot be mapped
                self._maps[name] = np.empty(0, dtype)
            else:
                self._maps[name] = np.asarray(np.memmap(self._folder / name, dtype, "r", HEADER_BYTES, (length,)))
        return self._maps[name]

    def _layout(self) -> dict[str, tuple[str, int]]:
        return layout(self._kind, self._vocab_size, self._entry.sequences, self._entry.tokens)


class Store:
    """A whole, checked store; make one with `Store.open(root)`. Safe to pickle.

    kind: "text", "conversations" or "preferences"
    fingerprint: names the content: every token, what is learned, and the tokenizer
    vocab_size: the tokenizer's; ids are below it
    index: store.json
    """

    def __init__(self, root: Path, index: dict[str, Any]) -> None:
        self.root = root
        self.index = index
        self.kind: Kind = index["kind"]
        self.fingerprint: str = index["fingerprint"]
        self.vocab_size: int = index["vocab_size"]
        self.entries = {name: SplitEntry(**entry) for name, entry in index["splits"].items()}

    @classmethod
    def open(cls, root: Path | str) -> Store:
        """Open the store in folder `root`: every file's size and layout is checked, and the tokenizer's bytes.

        Raises DataError if there is none or if it is damaged.
        """
        root = Path(root)
        index = _read_index(root)
        try:
            store = cls(root, index)
            if store.kind not in KINDS or set(store.entries) != set(SPLITS):
                raise ValueError("not a known kind, or not the splits train and val")
            counts = [store.vocab_size, *(n for each in store.entries.values() for n in each.counts)]
            if any(type(count) is not int or not 0 <= count < 1 << 53 for count in counts):
                raise ValueError("a count that is none")
            described = store_fingerprint(store.kind, store.vocab_size, store.entries, index["tokenizer"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{root / 'store.json'}: damaged ({error!r}): {again(root)}") from error
        if described != store.fingerprint:
            raise DataError(f"{root / 'store.json'}: changed since it was written: {again(root)}")
        found = tokenizer_digests(root / "tokenizer")
        for name, digest in index["tokenizer"].items():
            if found.get(name) != digest:
                what = "changed since it was written" if name in found else "is missing"
                raise DataError(f"{root / 'tokenizer' / name}: {what}: {again(root)}")
        for split in SPLITS:
            store.split(split).check_files()
        return store

    def __reduce__(self) -> tuple[Callable[..., Store], tuple[Any, ...]]:
        return Store, (self.root, self.index)

    def split(self, name: str) -> Sequences:
        """The sequences of "train" or "val"; "val" may have none. Raises DataError for any other name."""
        if name not in self.entries:
            raise DataError(f"no split {name!r}: use one of {', '.join(SPLITS)}")
        return Sequences(self.root / name, self.kind, self.vocab_size, self.entries[name])

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that made the tokens."""
        from trunkline.models.causal_lm.tokenizer import load_tokenizer

        return load_tokenizer(self.root / "tokenizer")

    def verify(self) -> None:
        """Read all values and compare them with their digests. Raises DataError naming the first file that differs."""
        for name in SPLITS:
            self.split(name).verify()


def layout(kind: Kind, vocab_size: int, sequences: int, tokens: int) -> dict[str, tuple[str, int]]:
    """dtype and length of each file of a split."""
    files = {"tokens.npy": ("<u2" if vocab_size <= 1 << 16 else "<u4", tokens), "offsets.npy": ("<i8", sequences + 1)}
    return files if kind == "text" else files | {"learned.npy": ("|b1", tokens), "first.npy": ("<i8", sequences)}


def npy_header(dtype: str, length: int) -> bytes:
    """The HEADER_BYTES before the values of a one-dimensional .npy file."""
    entry = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({length},), }}"
    size = HEADER_BYTES - 10
    return b"\x93NUMPY\x01\x00" + size.to_bytes(2, "little") + f"{entry:<{size - 1}}\n".encode()


def store_fingerprint(kind: Kind, vocab_size: int, splits: dict[str, SplitEntry], tokenizer: dict[str, str]) -> str:
    """Names a store's content: SHA-256, hexadecimal."""
    content = {
        "kind": kind,
        "vocab_size": vocab_size,
        "splits": {name: asdict(entry) for name, entry in splits.items()},
        "tokenizer": tokenizer,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def tokenizer_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in `folder` by its name; empty if there is no such folder."""
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    return {path.name: values_digest(path, skip=0) for path in files}


def values_digest(path: Path, skip: int = HEADER_BYTES) -> str:
    """SHA-256, hexadecimal, of a file's bytes after the first `skip`."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(skip)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def again(root: Path) -> str:
    """What to do about a damaged store."""
    return f"remove it and prepare the data set again, `{_PREPARE} {root} ...`"


def _read_index(root: Path) -> dict[str, Any]:
    path = root / "store.json"
    if not path.is_file():
        raise DataError(f"{root}: no prepared data set here (no store.json): make one with `{_PREPARE} {root} ...`")
    try:
        index = read_object(path, _MAX_JSON_BYTES)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged ({reason(error)}): {again(root)}") from error
    version = index.get("version")
    if type(version) is not int or version != VERSION:
        raise DataError(f"{path}: store version {version!r:.80} where {VERSION} is read: {again(root)}")
    return index
