from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.seq2seq.toy_data import toy_store
from trunkline.engine.data.store import INDEX, fingerprint
from trunkline.engine.errors import DataError
from trunkline.models.seq2seq.store import Store
from trunkline.models.text.token_store import token_dtype


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_store(tmp_path_factory.mktemp("store"), "pairs", count=40)


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "store"))


def test_sequences_lie_end_to_end(whole: Path) -> None:
    store = Store.open(whole)
    for part in (store.column("train", "input"), store.column("val", "target")):
        each = [part.tokens(number) for number in range(len(part))]
        stream = np.concatenate(each)
        assert part.lengths.tolist() == [len(tokens) for tokens in each]
        assert part.stretch(3, len(stream) - 2).tolist() == stream[3:-2].tolist()
        token = int(stream[5])
        assert part.places(token).tolist() == np.flatnonzero(stream == token).tolist()
        assert part.places(1).tolist() == []


def test_a_pickled_copy_reads_the_same(whole: Path) -> None:
    part = Store.open(whole).column("train", "input")
    assert pickle.loads(pickle.dumps(part)).tokens(3).tolist() == part.tokens(3).tolist()


def test_tokens_take_two_bytes_as_long_as_they_can() -> None:
    assert [token_dtype(size) for size in (384, 1 << 16, (1 << 16) + 1, 250_112)] == ["<u2", "<u2", "<u4", "<u4"]


def facts(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Changes the index so that its fingerprint still holds."""

    def damage(root: Path) -> None:
        index = json.loads((root / INDEX).read_text())
        change(index["facts"])
        index["fingerprint"] = fingerprint(index)
        (root / INDEX).write_text(json.dumps(index))

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no index": (lambda root: (root / INDEX).unlink(), "no prepared data set here"),
    "a file that is gone": (lambda root: (root / "val/targets.npy").unlink(), "targets.npy: is missing"),
    "a file cut short": (lambda root: (root / "val/inputs.npy").write_bytes(b"x"), "inputs.npy: has 1 bytes where"),
    "a tokenizer that is gone": (lambda root: (root / "tokenizer/tokenizer.json").unlink(), "tokenizer.json"),
    "another kind": (facts(lambda held: held.update(kind="text")), "not the arrays of its kind"),
    "no known kind": (facts(lambda held: held.update(kind="songs")), "not a known kind, or not the splits"),
    "no validation": (facts(lambda held: held["splits"].pop("val")), "not a known kind, or not the splits"),
    "a count too many": (facts(lambda held: held["splits"]["val"].update(samples=99)), "not the arrays of its kind"),
    "a count that is none": (facts(lambda held: held.update(vocab_size=1.5)), "a count that is none"),
    "a fact that is gone": (facts(lambda held: held.pop("vocab_size")), "damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_named(root: Path, damage: str) -> None:
    make, message = DAMAGES[damage]
    make(root)
    with pytest.raises(DataError, match=message) as raised:
        Store.open(root)
    assert str(root) in str(raised.value)
    assert "python launchers/prepare.py seq2seq --source FILES --train-tokenizer --out" in str(raised.value)


def test_a_changed_token_is_found_before_it_is_used(root: Path) -> None:
    path = root / "train/inputs.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train/inputs\.npy: .*"):
        Store.open(root).verify()
