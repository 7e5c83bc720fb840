"""Stores of version 1, which the engine's own store replaced, are read as they are."""

from __future__ import annotations

import hashlib
import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trunkline.engine.errors import DataError
from trunkline.models.causal_lm.store import Store
from trunkline.models.causal_lm.tokenizer import MIN_VOCAB_SIZE, train_tokenizer
from trunkline.models.text.tokenizer import tokenizer_digest

SEQUENCES = {"train": [([5, 6, 7], [0, 0, 1]), ([], []), ([1, 2, 3, 4], [1, 0, 0, 0])], "val": [([8, 8], [0, 1])]}
FIRST = {"train": [2, 0, 4], "val": [1]}


def write_version_1(root: Path, kind: str) -> str:
    """Write what that version wrote, byte for byte; returns its fingerprint."""
    splits: dict[str, Any] = {}
    for split, sequences in SEQUENCES.items():
        (root / split).mkdir(parents=True)
        lengths = [len(ids) for ids, _ in sequences]
        masks = [mask if kind != "text" else [1] * len(mask) for _, mask in sequences]
        arrays = {
            "tokens.npy": np.array([token for ids, _ in sequences for token in ids], np.uint16),
            "offsets.npy": np.cumsum([0, *lengths]),
        }
        if kind != "text":
            arrays |= {"learned.npy": np.array(list(chain(*masks)), bool), "first.npy": np.array(FIRST[split])}
        for name, array in arrays.items():
            np.save(root / split / name, array)
        splits[split] = {
            "sequences": len(sequences), "tokens": sum(lengths), "learned": sum(map(sum, masks)),
            "longest": max(lengths),
            "digests": {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()},
        }  # fmt: skip
    train_tokenizer([], MIN_VOCAB_SIZE).save_pretrained(root / "tokenizer")
    files = sorted((root / "tokenizer").iterdir())
    content = {
        "kind": kind, "vocab_size": MIN_VOCAB_SIZE, "splits": splits,
        "tokenizer": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
    }  # fmt: skip
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    index = {"version": 1, **content, "fingerprint": fingerprint, "made_from": {"kind": kind}}
    (root / "store.json").write_text(json.dumps(index, indent=1) + "\n")
    return fingerprint


@pytest.mark.parametrize("kind", ["text", "conversations"])
def test_it_reads_as_it_was_written_and_keeps_its_fingerprint(tmp_path: Path, kind: str) -> None:
    fingerprint = write_version_1(tmp_path / "store", kind)
    store = Store.open(tmp_path / "store")
    assert (store.fingerprint, store.kind, store.index["made_from"]) == (fingerprint, kind, {"kind": kind})
    for split, expected in SEQUENCES.items():
        sequences = store.split(split)
        assert [sequences.tokens(k).tolist() for k in range(len(sequences))] == [ids for ids, _ in expected]
        if kind != "text":
            assert [sequences.loss_mask(k).tolist() for k in range(len(sequences))] == [m for _, m in expected]
            assert sequences.first_learned.tolist() == FIRST[split]
    assert store.entries["train"].longest == 4
    assert tokenizer_digest(store.tokenizer()) == tokenizer_digest(train_tokenizer([], MIN_VOCAB_SIZE))
    store.verify()


@pytest.mark.parametrize("name", ["tokens", "offsets", "learned", "first"])
def test_its_values_are_verified(tmp_path: Path, name: str) -> None:
    write_version_1(tmp_path / "store", "conversations")
    path = tmp_path / f"store/train/{name}.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"train/{name}\.npy: damaged: .*sha256"):
        Store.open(tmp_path / "store").verify()


def test_an_index_or_a_tokenizer_that_was_changed_is_found(tmp_path: Path) -> None:
    write_version_1(tmp_path / "store", "text")
    path = tmp_path / "store/store.json"
    index = json.loads(path.read_text())
    for key, value in (("kind", "conversations"), ("vocab_size", 9), ("splits", {}), ("tokenizer", {})):
        path.write_text(json.dumps(index | {key: value}))
        with pytest.raises(DataError, match="changed since it was written"):
            Store.open(tmp_path / "store")
    path.write_text(json.dumps(index))
    (tmp_path / "store/tokenizer/tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer/tokenizer\.json: changed since it was written"):
        Store.open(tmp_path / "store")
