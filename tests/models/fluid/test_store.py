from __future__ import annotations

import io
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.engine.data.test_store import no_descriptors_left
from trunkline.engine.data.npy import Spec
from trunkline.engine.data.store import MAX_OPEN_MAPS, fingerprint
from trunkline.engine.errors import DataError
from trunkline.models.fluid.schema import GROUPS, Schema
from trunkline.models.fluid.store import Store
from trunkline.models.fluid.store_writer import write_store

SCHEMA = Schema(("B_001:FR",), dict.fromkeys(GROUPS, ()) | {"N": ("N_001_p", "N_002_p")})
MINUTES = 12


def case(number: int) -> tuple[np.ndarray, np.ndarray]:
    base = 1000.0 * number + 10 * np.arange(MINUTES, dtype=np.float32)
    return base[:, None], np.stack([base + 1, base + 2], axis=1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    train = {f"case_{number}": case(number) for number in (2, 1)}
    write_store(tmp_path / "s", SCHEMA, {"train": train, "val": {"v": case(3)}, "test": {"t": (case(4)[0], None)}})
    return tmp_path / "s"


def test_what_was_written_is_read(root: Path) -> None:
    store = Store.open(root)
    assert store.schema == SCHEMA
    assert store.minutes == MINUTES
    assert (store.cases("train"), store.cases("val"), store.cases("test")) == (["case_1", "case_2"], ["v"], ["t"])
    np.testing.assert_array_equal(store.boundary("train", "case_2"), case(2)[0])
    np.testing.assert_array_equal(store.state("train", "case_2"), case(2)[1])
    np.testing.assert_array_equal(store.state_rows("val", "v", 3, 7), case(3)[1][3:7])
    np.testing.assert_array_equal(store.boundary_rows("test", "t", 11, 12), case(4)[0][11:])
    assert store.state("test", "t") is None
    assert not store.has_state("test", "t")
    store.verify()


def test_statistics_are_those_of_the_training_split(root: Path) -> None:
    values = np.concatenate([np.concatenate(case(number), axis=1) for number in (1, 2)]).astype(np.float64)
    statistics = Store.open(root).statistics
    np.testing.assert_allclose(statistics["mean"], values.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics["std"], values.std(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics["median"], np.median(values, axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics["change_mean"], 10, rtol=1e-12)


def test_arrays_are_plain_npy_files(root: Path) -> None:
    np.testing.assert_array_equal(np.load(root / "train/case_1/state.npy", allow_pickle=False), case(1)[1])
    for shape in ((1440, 538), (1440, 6174), (1, 1), (123456, 7890123)):
        array = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), shape, (0, 0))
        assert Spec("<f4", shape, "").header == _numpys_header(array)


def _numpys_header(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    description = np.lib.format.header_data_from_array_1_0(np.empty(0, np.float32)) | {"shape": array.shape}
    np.lib.format.write_array_header_1_0(out, description)
    return out.getvalue()


def test_maps_are_read_only_and_few(root: Path) -> None:
    store = Store.open(root)
    with pytest.raises(ValueError, match="read-only"):
        store.boundary("train", "case_1")[0, 0] = 1
    for _ in range(3):
        for split in ("train", "val"):
            for name in store.cases(split):
                store.boundary(split, name)
                store.state(split, name)
    assert store._map.cache_info().currsize == 6
    assert MAX_OPEN_MAPS <= 16


def test_a_pickled_store_is_the_same_store(root: Path) -> None:
    store = Store.open(root)
    store.state_rows("val", "v", 0, 1)
    copy = pickle.loads(pickle.dumps(store))
    assert copy.fingerprint == store.fingerprint
    np.testing.assert_array_equal(copy.state_rows("val", "v", 0, 5), case(3)[1][:5])


@pytest.mark.parametrize("name", ["schema", "statistics"])
def test_what_the_system_refuses_is_no_reason_to_remove_the_data(root: Path, name: str) -> None:
    store = pickle.loads(pickle.dumps(Store.open(root)))  # as a process that reads data has it: nothing is read yet
    with no_descriptors_left(), pytest.raises(DataError) as caught:
        getattr(store, name)
    path, said = next(root.glob(f"{name}.*")), str(caught.value)
    remedy = "mend that, and run the same command again"
    assert re.fullmatch(rf"{path}: cannot be read[a-z :(]+Too many open files\)?: {remedy}", said)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (5, 4), (0, MINUTES + 1)])
def test_rows_outside_a_case_are_refused(root: Path, start: int, stop: int) -> None:
    with pytest.raises(IndexError):
        Store.open(root).state_rows("train", "case_1", start, stop)


def test_unknown_names_are_refused(root: Path) -> None:
    store = Store.open(root)
    with pytest.raises(DataError, match="no split 'training': use one of train, val, test"):
        store.cases("training")
    with pytest.raises(DataError, match="no case 'case_9' in split 'train', which has 2 cases"):
        store.state("train", "case_9")


def test_the_fingerprint_names_the_content(root: Path, tmp_path: Path) -> None:
    splits = {"train": {"case_1": case(1), "case_2": case(2)}, "val": {"v": case(3)}}
    same = write_store(tmp_path / "same", SCHEMA, splits | {"test": {"t": (case(4)[0], None)}})
    assert same.fingerprint == Store.open(root).fingerprint
    changed = case(3)
    changed[1][5, 0] += 0.5
    other = write_store(tmp_path / "other", SCHEMA, splits | {"val": {"v": changed}, "test": {"t": (case(4)[0], None)}})
    assert other.fingerprint != same.fingerprint


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _edit_index(**changes: object) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        path = root / "store.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def _elsewhere(root: Path) -> None:
    _with_array(root, "../../etc/boundary")


def _one_more(root: Path) -> None:
    (root / "train/more.npy").write_bytes((root / "val/v/state.npy").read_bytes())
    _with_array(root, "train/more")


def _with_array(root: Path, name: str) -> None:
    """With an index that somebody made, fingerprint included."""
    index = json.loads((root / "store.json").read_text())
    index["arrays"][name] = index["arrays"]["val/v/state"]
    (root / "store.json").write_text(json.dumps(index | {"fingerprint": fingerprint(index)}))


def _pipe(name: str) -> Callable[[Path], object]:
    return lambda root: ((root / name).unlink(), os.mkfifo(root / name))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "unfinished": (lambda r: (r / "store.json").unlink(), "preparation of this data set was not finished"),
    "index cut": (lambda r: _cut(r / "store.json") or _cut(r / "store.json"), r"store\.json: damaged"),
    "index of another kind": (
        lambda r: (r / "store.json").write_text("[]"),
        r"store\.json: damaged \(it does not hold an object",
    ),
    "index of version true": (_edit_index(version=True), r"store\.json: store version True where 2 is read"),
    "index of a day without end": (
        _edit_index(facts={"minutes": 10**400}),
        r"store\.json: damaged \(1000.* is larger than any number",
    ),
    "index of other facts": (_edit_index(facts={"minutes": "1440"}), r"store\.json: changed since it was written"),
    "index with a case elsewhere": (_elsewhere, r"store\.json: damaged \(a file that would lie elsewhere"),
    "index with an array more": (_one_more, r"train/more\.npy: does not fit schema\.json"),
    "index nested deep": (
        lambda r: (r / "store.json").write_text("[" * 100_000),
        r"store\.json: damaged \(nested more",
    ),
    "schema nested deep": (
        lambda r: (r / "schema.json").write_text("[" * 100_000),
        r"schema\.json: changed since it was written",
    ),
    "schema a pipe": (_pipe("schema.json"), r"schema\.json: .*it is a named pipe, where a file is expected"),
    "statistics a pipe": (_pipe("statistics.safetensors"), r"statistics\.safetensors: .*it is a named pipe"),
    "state a pipe": (_pipe("val/v/state.npy"), r"val/v/state\.npy: cannot be read: it is a named pipe"),
    "index of a later version": (_edit_index(version=7), r"store\.json: store version 7 where 2 is read"),
    "index without arrays": (_edit_index(arrays=None), r"store\.json: changed since it was written"),
    "index of another workload": (_edit_index(workload="weather"), r"is a data set of 'weather', not of 'fluid'"),
    "state cut": (lambda r: _cut(r / "val/v/state.npy"), r"val/v/state\.npy: has \d+ bytes where \d+ were written"),
    "state missing": (lambda r: (r / "val/v/state.npy").unlink(), r"val/v/state\.npy: is missing"),
    "boundary missing": (lambda r: (r / "test/t/boundary.npy").unlink(), r"test/t/boundary\.npy: is missing"),
    "schema missing": (lambda r: (r / "schema.json").unlink(), r"schema\.json: is missing"),
    "schema of another": (
        lambda r: Schema(("B_002:FR",), SCHEMA.groups).write(r),
        r"schema\.json: changed since it was written",
    ),
    "statistics cut": (lambda r: _cut(r / "statistics.safetensors"), r"statistics\.safetensors: changed"),
    "statistics missing": (
        lambda r: (r / "statistics.safetensors").unlink(),
        r"statistics\.safetensors: is missing",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_when_the_store_is_opened(root: Path, name: str) -> None:
    harm, message = DAMAGE[name]
    harm(root)
    with pytest.raises(DataError, match=message) as error:
        Store.open(root)
    assert "prepare" in str(error.value)


def test_no_store_at_all_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no prepared data set here .* make one with `python launchers/prepare\.py fluid"
    ):
        Store.open(tmp_path)


def test_a_flipped_bit_is_found_by_verify(root: Path) -> None:
    path = root / "val/v/state.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"val/v/state\.npy: damaged"):
        Store.open(root).verify()


def test_a_damaged_header_is_found_when_rows_are_read(root: Path) -> None:
    path = root / "val/v/state.npy"
    content = bytearray(path.read_bytes())
    content[9] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"val/v/state\.npy: damaged: not an array of <f4 \[12, 2\]"):
        Store.open(root).state_rows("val", "v", 0, 1)


_GROWTH = """
import sys
import psutil
from trunkline.models.fluid.store import Store
store = Store.open(sys.argv[1])
def resident():
    return psutil.Process().memory_info().rss  # file-backed pages included
def read(cases):
    for case in cases:
        store.boundary_rows("train", case, 0, store.minutes)
        for start in range(0, store.minutes, 16):
            store.state_rows("train", case, start, start + 16)
        if sys.argv[2] == "maps":
            store.state("train", case).sum()
            store.boundary("train", case).sum()
cases = store.cases("train")
read(cases[:6])
few = resident()
read(cases[6:])
print(resident() - few)
"""


@pytest.fixture(scope="module")
def many_cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many")
    names = tuple(f"N_{number:03d}_p" for number in range(512))
    schema = Schema(("B_001:FR",), dict.fromkeys(GROUPS, ()) | {"N": names})
    values = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)  # 1 MiB
    write_store(root, schema, {"train": {f"case_{k:02d}": (values[:, :1], values) for k in range(30)}})
    return root


@pytest.mark.parametrize("how", ["rows", "maps"])
def test_memory_does_not_grow_with_the_number_of_cases(many_cases: Path, how: str) -> None:
    program = [sys.executable, "-c", _GROWTH, str(many_cases), how]
    grown = int(subprocess.run(program, check=True, capture_output=True, text=True).stdout)
    assert grown < 3 << 20, f"{grown} bytes more after 24 further cases of 1 MiB"
