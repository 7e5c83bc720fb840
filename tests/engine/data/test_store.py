from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.distributed import run_distributed_test
from trunkline.engine.data.npy import NpyWriter, Spec, write_npy
from trunkline.engine.data.store import VERIFIED, ArrayStore, fingerprint, verify_together
from trunkline.engine.data.store_writer import draft_of, publish, read_part, write_index, write_part
from trunkline.engine.errors import DataError
from trunkline.engine.machine.files import pieces_written
from trunkline.engine.ranks.distributed import Ranks

PICTURES = [b"\xff\xd8 first", b"", b"\x89PNG" * 50, b"x"]
LABELS = np.array([3, 1, 0, 2])
IDS = np.arange(4 * 6, dtype=np.uint16).reshape(4, 2, 3)


class Pictures(ArrayStore):
    workload = "pictures"
    prepare = "python make_pictures.py --out"


def write(out: Path) -> Pictures:
    """Encoded pictures of any size, a label each, and ids in two dimensions."""
    with draft_of(out) as draft:
        with NpyWriter(draft / "pictures.npy", "|u1") as pictures:
            for data in PICTURES:
                pictures.add(np.frombuffer(data, np.uint8))
            arrays = {"pictures": pictures.finish("offsets")}
        offsets = np.cumsum([0, *map(len, PICTURES)])
        arrays |= {
            name: write_npy(draft / f"{name}.npy", array)
            for name, array in {"offsets": offsets, "labels": LABELS, "ids": IDS}.items()
        }
        (draft / "classes.json").write_text('["a", "b", "c", "d"]')
        write_index(draft, "pictures", arrays, ["classes.json"], {"size": 64}, {"made from": "nothing"})
        publish(draft, out)
    return Pictures.open(out)


@pytest.fixture
def store(tmp_path: Path) -> Pictures:
    return write(tmp_path / "store")


def flip(path: Path, place: int = -1, keep_time: bool = False) -> None:
    """Change one bit; with `keep_time` as a disk would that forgets."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[place] ^= 4
    with path.open("r+b") as file:
        file.write(data)
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))


def test_bytes_rows_and_what_describes_them_are_read_as_written(store: Pictures) -> None:
    pictures = store["pictures"]
    assert len(pictures) == 4
    assert [pictures.item(k).tobytes() for k in range(4)] == PICTURES
    assert pictures.lengths.tolist() == [len(data) for data in PICTURES]
    assert pictures.item(2, 1, 4).tobytes() == b"PNG"
    assert pictures.item(0, 3, 10**9).tobytes() == PICTURES[0][3:]
    assert pictures.item(3, 5).tobytes() == b""
    with pytest.raises(IndexError, match="item 4 of 4"):
        pictures.item(4)
    np.testing.assert_array_equal(store["ids"].rows(1, 3), IDS[1:3])
    np.testing.assert_array_equal(store["labels"].map(), LABELS)
    assert (store.facts, store.index["made from"]) == ({"size": 64}, "nothing")
    with pytest.raises(ValueError, match="read-only"):
        store["labels"].map()[0] = 1


def test_a_store_without_rows_is_read_too(tmp_path: Path) -> None:
    arrays = {
        "x": write_npy(tmp_path / "x.npy", np.zeros((0, 3))),
        "o": write_npy(tmp_path / "o.npy", np.zeros(1, int)),
    }
    arrays["r"] = Spec(**vars(write_npy(tmp_path / "r.npy", np.zeros(0, np.uint8))) | {"offsets": "o"})
    write_index(tmp_path, "pictures", arrays, [], {}, {})
    store = Pictures.open(tmp_path)
    store.verify()
    assert (store["x"].rows(0, 0).shape, store["x"].map().shape) == ((0, 3), (0, 3))
    assert (len(store["r"]), store["r"].lengths.tolist()) == (0, [])


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """The system opens no file then, which holds for root too."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    os.close(free := os.open(os.devnull, os.O_RDONLY))
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_what_the_system_refuses_is_no_reason_to_remove_the_data(store: Pictures) -> None:
    store = Pictures.open(store.root)
    for read in (lambda: store["ids"].rows(0, 1), lambda: Pictures.open(store.root)):
        with (
            no_descriptors_left(),
            pytest.raises(DataError, match=r"Too many open files.*: mend that, and run the same command again$"),
        ):
            read()


@pytest.mark.parametrize("how", ["read", "map", "verify"])
@pytest.mark.parametrize("name", ["pictures", "offsets", "labels", "ids"])
def test_a_flipped_bit_is_an_error_before_its_values_are_used(store: Pictures, name: str, how: str) -> None:
    path, digest = store.path(name), store.arrays[name].digest
    flip(path)
    store = Pictures.open(store.root)
    remedy = rf"remove {store.root} and prepare the data set again, `python make_pictures\.py --out {store.root}`"
    with pytest.raises(DataError, match=rf"{path}: damaged: .*blocks:.*{digest}.*{remedy}"):
        {"read": lambda: store[name].rows(0, 1), "map": store[name].map, "verify": store.verify}[how]()


@pytest.mark.parametrize("name", ["labels.npy", "classes.json"])
def test_of_a_deleted_file_it_says_which_folder_to_remove_and_how_to_make_it_anew(store: Pictures, name: str) -> None:
    root = store.root
    (root / name).unlink()
    with pytest.raises(DataError) as caught:
        Pictures.open(root)
    remedy = f"remove {root} and prepare the data set again, `python make_pictures.py --out {root}`"
    assert str(caught.value) == f"{root / name}: is missing: {remedy}"


def test_another_file_in_its_place_is_an_error(tmp_path: Path, store: Pictures) -> None:
    other = write_npy(tmp_path / "other.npy", LABELS[::-1])
    assert other.shape == store.arrays["labels"].shape
    (tmp_path / "other.npy").replace(store.path("labels"))
    with pytest.raises(DataError, match=r"labels\.npy: damaged: its values are not those"):
        Pictures.open(store.root)["labels"].rows(0, 1)


def test_other_names_dtypes_shapes_and_files_are_found_when_it_is_opened(store: Pictures) -> None:
    flip(store.root / "classes.json")
    with pytest.raises(DataError, match=r"classes\.json: changed since it was written"):
        Pictures.open(store.root)
    flip(store.root / "classes.json")
    np.save(store.path("labels"), LABELS.astype(np.float64))
    with pytest.raises(DataError, match=r"labels\.npy: damaged: not an array of <i8 \[4\]"):
        Pictures.open(store.root)
    np.save(store.path("labels"), LABELS)
    index = json.loads((store.root / "store.json").read_text())
    index["arrays"]["pictures"]["offsets"] = "ids"
    (store.root / "store.json").write_text(json.dumps(index | {"fingerprint": fingerprint(index)}))
    with pytest.raises(DataError, match=r"store\.json: damaged \(offsets of 'pictures' that are none"):
        Pictures.open(store.root)


def test_offsets_that_go_back_are_no_offsets(store: Pictures) -> None:
    index = json.loads((store.root / "store.json").read_text())
    index["arrays"]["offsets"] = write_npy(store.path("offsets"), np.array([0, 20, 10, 200, 211])).to_json()
    (store.root / "store.json").write_text(json.dumps(index | {"fingerprint": fingerprint(index)}))
    with pytest.raises(DataError, match=r"offsets\.npy: not the offsets of values"):
        _ = Pictures.open(store.root)["pictures"].lengths


def test_what_was_verified_is_remembered_until_the_file_is_another(store: Pictures) -> None:
    store.verify()
    flip(store.path("ids"), keep_time=True)
    Pictures.open(store.root).verify()  # same size, time and inode: not read again
    (store.root / VERIFIED).unlink()
    with pytest.raises(DataError, match=r"ids\.npy: damaged"):
        Pictures.open(store.root).verify()
    flip(store.path("ids"), keep_time=True)
    Pictures.open(store.root).verify()

    copy = store.root / "copy"
    shutil.copy2(store.path("ids"), copy)  # the same time, another inode
    flip(copy, keep_time=True)
    copy.replace(store.path("ids"))
    with pytest.raises(DataError, match=r"ids\.npy: damaged"):
        Pictures.open(store.root).verify()


@pytest.mark.parametrize("content", [None, "[1]", '{"ids": 7}', "{"])
def test_a_memory_that_cannot_be_kept_or_read_only_costs_time(store: Pictures, content: str | None) -> None:
    if content is None:
        (store.root / VERIFIED).mkdir()
    else:
        (store.root / VERIFIED).write_text(content)
    Pictures.open(store.root).verify()
    flip(store.path("ids"))
    with pytest.raises(DataError, match=r"ids\.npy: damaged"):
        Pictures.open(store.root).verify()


class Items:
    def __init__(self, store: Pictures) -> None:
        self.pictures = store["pictures"]

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> bytes:
        return self.pictures.item(index).tobytes()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_same(store: Pictures, method: str) -> None:
    store["pictures"].item(0)  # its file is open here
    loader = DataLoader(Items(store), batch_size=None, num_workers=1, multiprocessing_context=method)  # type: ignore[arg-type]
    assert list(loader) == PICTURES


def test_a_pickled_store_is_small_and_knows_what_was_verified(store: Pictures) -> None:
    store.verify()
    data = pickle.dumps(store["pictures"])
    assert len(data) < 4000
    (store.root / VERIFIED).unlink()
    before = pieces_written()
    assert pickle.loads(data).item(0).tobytes() == PICTURES[0]
    assert pieces_written() == before, "it was verified again"


def _verify_on_ranks(rank: int, world_size: int, good: Path, bad: Path) -> tuple[bool, list[bytes], str]:
    ranks, store = Ranks(rank, world_size, rank, torch.device("cpu")), Pictures.open(good)
    before = pieces_written()
    verify_together([store["pictures"], store["offsets"]], ranks)
    hashed = pieces_written() != before
    with pytest.raises(DataError) as error:
        verify_together([Pictures.open(bad)["pictures"]], ranks)
    return hashed, [store["pictures"].item(k).tobytes() for k in range(4)], str(error.value)


@pytest.mark.distributed
def test_ranks_of_one_machine_verify_once_and_hear_the_same_verdict(store: Pictures, tmp_path: Path) -> None:
    (store.root / VERIFIED).mkdir()  # so that no rank reads what another has found
    bad = write(tmp_path / "bad")
    flip(bad.path("pictures"))
    (hashed, read, said), (hashed_too, read_too, said_too) = run_distributed_test(
        _verify_on_ranks, 2, store.root, bad.root
    )
    assert (hashed, hashed_too) == (True, False)
    assert read == read_too == PICTURES
    assert said == said_too
    assert f"{bad.path('pictures')}: damaged" in said


def test_a_part_is_whole_or_not_there(tmp_path: Path) -> None:
    folder = tmp_path / "part"
    (tmp_path / ".part.partial").mkdir()
    (tmp_path / ".part.partial/labels.npy").write_bytes(b"half")
    assert read_part(folder) is None
    part = write_part(folder, {"labels": LABELS}, {"source": [1, "a"]})
    assert read_part(folder) == part
    assert os.listdir(tmp_path) == ["part"]
    write_part(folder, {"ids": IDS}, {})
    assert sorted(os.listdir(folder)) == ["ids.npy", "part.json"]
    (folder / "ids.npy").write_bytes(b"cut")
    assert read_part(folder) is None


def test_offsets_that_are_cut_short_while_they_are_read_are_an_error(store: Pictures) -> None:
    pictures = store["pictures"]
    pictures.item(0)
    os.truncate(store.path(str(pictures.spec.offsets)), 130)
    with pytest.raises(DataError, match=r"offsets\.npy"):
        pictures.item(len(pictures) - 1)
