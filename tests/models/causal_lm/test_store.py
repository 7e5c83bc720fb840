from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from trunkline.engine.data.store import fingerprint
from trunkline.engine.data.store_writer import draft_of
from trunkline.engine.errors import DataError
from trunkline.models.causal_lm.records import Kind
from trunkline.models.causal_lm.rendering import Rendered
from trunkline.models.causal_lm.store import Store
from trunkline.models.causal_lm.store_writer import StoreWriter
from trunkline.models.causal_lm.tokenizer import MIN_VOCAB_SIZE, train_tokenizer
from trunkline.models.text.tokenizer import tokenizer_digest

Given = list[tuple[list[int], list[int]]]
TRAIN: Given = [([5, 6, 7], [0, 0, 1]), ([], []), ([9], [1]), ([1, 2, 3, 4], [1, 0, 0, 0])]
VAL: Given = [([8, 8], [0, 1])]


def write(out: Path, kind: Kind = "conversations", vocab_size: int = MIN_VOCAB_SIZE, train: Given = TRAIN) -> Store:
    step = 2 if kind == "preferences" else 1
    val = VAL * step
    with draft_of(out) as draft:
        train_tokenizer([], MIN_VOCAB_SIZE).save_pretrained(draft / "tokenizer")
        with StoreWriter(draft, kind, vocab_size) as writer:
            for split, sequences in (("train", train), ("val", val)):
                rendered = [Rendered(np.array(ids, np.int64), np.array(mask, bool)) for ids, mask in sequences]
                for i in range(0, len(rendered), step):
                    writer.add(split, rendered[i : i + step])  # type: ignore[arg-type]
            return writer.finish(out)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return write(tmp_path / "store")


def test_what_is_written_is_read(store: Store) -> None:
    store = Store.open(store.root)
    assert (store.kind, store.vocab_size) == ("conversations", MIN_VOCAB_SIZE)
    for split, expected in (("train", TRAIN), ("val", VAL)):
        sequences = store.split(split)
        assert len(sequences) == len(expected)
        assert sequences.lengths.tolist() == [len(ids) for ids, _ in expected]
        for i, (ids, mask) in enumerate(expected):
            assert sequences.tokens(i).tolist() == ids
            assert sequences.loss_mask(i).tolist() == [bool(m) for m in mask]
            assert sequences.tokens(i).dtype == np.int64
            assert sequences.loss_mask(i).dtype == bool
    # position 0 is never predicted: a sequence that is learned there only has no first learned token
    assert store.split("train").first_learned.tolist() == [2, 0, 1, 4]
    assert tokenizer_digest(store.tokenizer()) == tokenizer_digest(train_tokenizer([], MIN_VOCAB_SIZE))
    store.verify()


def test_a_part_of_a_sequence_never_reaches_into_the_next(store: Store) -> None:
    sequences = store.split("train")
    assert sequences.tokens(3, 1, 3).tolist() == [2, 3]
    assert sequences.loss_mask(3, 0, 2).tolist() == [True, False]
    assert sequences.tokens(0, 1, 99).tolist() == [6, 7]
    with pytest.raises(IndexError, match="item 4 of 4"):
        sequences.tokens(4)


def test_texts_are_learned_whole_and_store_no_mask(tmp_path: Path) -> None:
    sequences = write(tmp_path / "store", "text").split("train")
    assert sequences.loss_mask(0).tolist() == [True] * 3
    assert sequences.first_learned.tolist() == [1, 0, 1, 1]
    assert sorted(path.name for path in (tmp_path / "store/train").iterdir()) == ["offsets.npy", "tokens.npy"]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_tokens_take_as_many_bytes_as_the_vocabulary_needs(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    last = vocab_size - 1
    store = write(tmp_path / "store", "text", vocab_size, [([0, last], [1, 1])])
    assert store.split("train").tokens(0).tolist() == [0, last]
    assert np.load(tmp_path / "store/train/tokens.npy").dtype == dtype


@pytest.mark.parametrize("token", [-1, MIN_VOCAB_SIZE])
def test_a_token_outside_the_vocabulary_is_an_error(tmp_path: Path, token: int) -> None:
    with pytest.raises(DataError, match=f"token {token}, outside its vocabulary of {MIN_VOCAB_SIZE}"):
        write(tmp_path / "store", train=[([1, token], [0, 1])])
    assert not (tmp_path / "store").exists()


def test_the_fingerprint_names_the_content(tmp_path: Path) -> None:
    first = write(tmp_path / "a").fingerprint
    assert write(tmp_path / "b").fingerprint == first
    other_mask: Given = [([5, 6, 7], [0, 1, 1]), *TRAIN[1:]]
    other_split: Given = [([5, 6], [0, 0]), ([7], [1]), *TRAIN[2:]]
    different = [write(tmp_path / str(i), train=train) for i, train in enumerate((other_mask, other_split))]
    different.append(write(tmp_path / "text", "text"))
    assert len({first, *(store.fingerprint for store in different)}) == 4


def test_a_pickled_store_holds_no_arrays_and_reads_for_itself(store: Store) -> None:
    sequences = store.split("train")
    sequences.tokens(0)
    data = pickle.dumps((store, sequences))
    assert len(data) < 6000
    copied_store, copied = pickle.loads(data)
    assert copied_store._map.cache_info().currsize == 0
    assert copied.tokens(3).tolist() == [1, 2, 3, 4]
    assert copied_store.fingerprint == store.fingerprint


class _Tokens:
    def __init__(self, store: Store) -> None:
        self.sequences = store.split("train")

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> list[int]:
        return self.sequences.tokens(index).tolist()


def test_workers_of_a_loader_read_the_same(store: Store) -> None:
    loader = DataLoader(_Tokens(store), batch_size=None, num_workers=2)  # type: ignore[arg-type]
    assert [list(ids) for ids in loader] == [ids for ids, _ in TRAIN]


@pytest.mark.parametrize("name", ["tokens.npy", "offsets.npy", "learned.npy", "first.npy"])
def test_a_file_cut_short_or_gone_is_named(store: Store, name: str) -> None:
    path = store.root / "train" / name
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match=rf"{name}: has {len(data) - 1} bytes where {len(data)} were written"):
        Store.open(store.root)
    path.write_bytes(b"\x94" + data[1:])
    with pytest.raises(DataError, match=rf"{name}: damaged"):
        Store.open(store.root)
    path.unlink()
    with pytest.raises(
        DataError, match=rf"{name}: is missing: .*launchers/prepare\.py causal_lm --kind .* --out {store.root}"
    ):
        Store.open(store.root)


def test_flipped_values_show_when_verified(store: Store) -> None:
    path = store.root / "val/tokens.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    Store.open(store.root)
    with pytest.raises(DataError, match=r"val/tokens\.npy: damaged: its values are not those that were written"):
        store.verify()


def test_another_index_or_tokenizer_is_not_taken_for_the_one_written(store: Store) -> None:
    config = store.root / "tokenizer/tokenizer_config.json"
    before = config.read_text()
    config.write_text(before.replace("endoftext", "im_end"))
    with pytest.raises(DataError, match=r"tokenizer_config\.json: changed since it was written"):
        Store.open(store.root)
    config.write_text(before)
    path = store.root / "store.json"
    index = json.loads(path.read_text())
    for key, value, message in [
        ("version", 0, "store version 0 where 2 is read"),
        ("arrays", {}, "changed since it was written"),
        ("facts", index["facts"] | {"kind": "text"}, "changed since it was written"),
        ("facts", index["facts"] | {"vocab_size": 9}, "changed since it was written"),
        ("files", {}, "changed since it was written"),
    ]:
        path.write_text(json.dumps(index | {key: value}))
        with pytest.raises(DataError, match=message):
            Store.open(store.root)
    path.write_text("{")
    with pytest.raises(DataError, match=r"store\.json: damaged"):
        Store.open(store.root)


def test_a_draft_is_no_store_and_goes_if_it_was_not_finished(tmp_path: Path) -> None:
    out = tmp_path / "store"
    with draft_of(out) as draft, StoreWriter(draft, "text", 300) as writer:
        writer.add("train", [Rendered(np.array([1, 2]), np.ones(2, bool))])
        for folder in (out, draft):
            with pytest.raises(DataError, match=r"no prepared data set here \(no store\.json\)"):
                Store.open(folder)
    assert list(tmp_path.iterdir()) == []
    store = write(out)
    assert list(tmp_path.iterdir()) == [out]
    assert len(store.split("train")) == len(TRAIN)


def test_two_writers_of_one_store_exclude_each_other(tmp_path: Path) -> None:
    with (
        draft_of(tmp_path / "store"),
        pytest.raises(DataError, match="another preparation is writing this folder"),
        draft_of(tmp_path / "store"),
    ):
        pass


def test_a_folder_that_holds_something_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store/diary.txt").write_text("dear")
    with pytest.raises(DataError, match="choose another --out"):
        write(tmp_path / "store")
    assert os.listdir(tmp_path / "store") == ["diary.txt"]


INDICES: dict[str, tuple[object, str]] = {
    "nested deep": ("[" * 100_000, r"damaged \(nested more than 64 deep\)"),
    "version true": ({"version": True}, "store version True where 2 is read"),
    "a size that is a word": ({"vocab_size": "300"}, r"damaged \(a count that is none\)"),
    "a size without end": ({"vocab_size": 10**400}, r"damaged \(10+\.\.\. is larger than any number"),
    "a split more": ({"splits": {"train": {}, "val": {}, "test": {}}}, r"damaged \("),
    "splits that are a list": ({"splits": [1]}, r"damaged \("),
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_of_other_types_is_named(store: Store, name: str) -> None:
    change, message = INDICES[name]
    path = store.root / "store.json"
    if isinstance(change, str):
        path.write_text(change)
    else:
        assert isinstance(change, dict)
        index = json.loads(path.read_text())
        index |= change if "version" in change else {"facts": index["facts"] | change}
        path.write_text(json.dumps(index | {"fingerprint": fingerprint(index)}))
    with pytest.raises(DataError, match=rf"store\.json: {message}"):
        Store.open(store.root)
