from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models.fluid.csv_tree import COLUMNS, STATES, output, set_point, write_case
from trunkline.engine.errors import DataError
from trunkline.models.fluid.csv.cases import read_case
from trunkline.models.fluid.data import FluidWindows, collate
from trunkline.models.fluid.schema import GROUPS, Schema
from trunkline.models.fluid.store import Store
from trunkline.models.fluid.store_writer import write_store

SCHEMA = Schema(COLUMNS["Boundary"], {group: COLUMNS[group] for group in GROUPS})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Three days that went through CSV files; the third has no outputs."""
    root = tmp_path_factory.mktemp("fluid")
    cases = {}
    for number in (1, 2, 3):
        read = read_case(write_case(root / str(number), number, outputs=number < 3), SCHEMA)
        cases[f"case_{number}"] = (read.boundary, read.state)
    return write_store(root / "store", SCHEMA, {"train": cases, "test": {"case_3": cases["case_3"]}})


def test_a_window_by_hand(store: Store) -> None:
    windows = FluidWindows(store, "train", history=3)
    # Window 177 of the first case: its input minutes are 2:58, 2:59 and 3:00; set-points move at 3:00 (row 6).
    x, target, _ = windows[177]
    assert (x.shape, target.shape) == ((3, 2 + len(STATES)), (3, len(STATES)))
    assert x.dtype == target.dtype == np.float32
    assert x[:, 0].tolist() == [set_point(0, 5), set_point(0, 6), set_point(0, 6)]  # known one minute ahead
    assert x[:, 1].tolist() == [set_point(1, 5), set_point(1, 6), set_point(1, 6)]
    for k, minute in enumerate((178, 179, 180)):
        assert x[k, 2:].tolist() == [output(column, minute, 1) for column in range(len(STATES))]
        assert target[k].tolist() == [output(column, minute + 1, 1) for column in range(len(STATES))]


def test_windows_cover_each_case_and_never_two(store: Store) -> None:
    windows = FluidWindows(store, "train", history=3)
    assert len(windows) == 2 * 1437
    assert windows.cases == ["case_1", "case_2"]  # a case without outputs gives no window
    assert windows.locate(1436) == ("case_1", 1436)
    assert windows.locate(1437) == ("case_2", 0)
    x, target, _ = windows[1436]
    assert x[0, 2] == output(0, 1437, 1)
    assert target[-1, 0] == output(0, 1440, 1)
    x, target, _ = windows[1437]
    assert x[0, 2] == output(0, 1, 2)
    assert target[0, 0] == output(0, 2, 2)


def test_windows_of_changed_set_points_stand_as_often_as_asked_with_as_much_less_weight(store: Store) -> None:
    plain, repeated = (FluidWindows(store, "train", 3, ahead=2, event_repeats=times) for times in (1, 5))
    found: dict[tuple[str, int], list[float]] = {}
    for index in range(len(repeated)):
        found.setdefault(repeated.locate(index), []).append(float(repeated[index][2]))
    assert set(found) == {plain.locate(index) for index in range(len(plain))}
    # set-points move each half hour, of which a window that starts at row r has the change at its row r + 3
    changes = {row for row in range(plain.windows_per_case) if (row + 3 + 1) % 30 == 0}
    for (_, row), weights in found.items():
        assert weights == (pytest.approx([0.2] * 5) if row in changes else [1.0])
    for index in (0, len(plain), len(repeated) - 1):
        place = next(k for k in range(len(plain)) if plain.locate(k) == repeated.locate(index))
        np.testing.assert_array_equal(repeated[index][0], plain[place][0])


def test_windows_end_where_the_data_does(store: Store) -> None:
    windows = FluidWindows(store, "train", history=3)
    for index in (-1, len(windows)):
        with pytest.raises(IndexError):
            windows[index]


@pytest.mark.parametrize(("targets", "ahead"), [(None, 0), (1, 0), (2, 3)])
def test_many_windows_are_those_of_one_by_one(store: Store, targets: int | None, ahead: int) -> None:
    windows = FluidWindows(store, "train", 3, targets, ahead)
    indices = [177, 2000, 0, len(windows) - 1, 177]
    for together, index in zip(windows.__getitems__(indices), indices, strict=True):
        for found, alone in zip(together, windows[index], strict=True):
            assert found.dtype == alone.dtype
            np.testing.assert_array_equal(found, alone)
    with pytest.raises(IndexError):
        windows.__getitems__([0, len(windows)])


def test_a_file_cut_short_after_it_was_opened_is_named(store: Store, tmp_path: Path) -> None:
    root = shutil.copytree(store.root, tmp_path / "store")
    windows = FluidWindows(Store.open(root), "train", 3)
    windows.__getitems__([0, 1500])
    os.truncate(root / "train/case_2/state.npy", 1000)
    with pytest.raises(DataError, match=r"case_2/state\.npy: cut short since it was opened: .*prepare"):
        windows.__getitems__([0, 1500])


@pytest.mark.parametrize("history", [1, 10, 1439])
def test_any_history_that_fits_a_case(store: Store, history: int) -> None:
    windows = FluidWindows(store, "train", history)
    assert len(windows) == 2 * (1440 - history)
    x, target, _ = windows[len(windows) - 1]
    assert x[:, 2].tolist() == [output(0, minute, 2) for minute in range(1440 - history, 1440)]
    assert target[-1, 0] == output(0, 1440, 2)


@pytest.mark.parametrize("history", [0, -3, 1440])
def test_a_history_that_does_not_fit_is_refused(store: Store, history: int) -> None:
    with pytest.raises(DataError, match=rf"history is {history}: use 1 to 1439"):
        FluidWindows(store, "train", history)


def test_a_split_without_windows_is_named(store: Store) -> None:
    with pytest.raises(DataError, match=r"split 'val' has no windows: it has no cases.*--val-fraction"):
        FluidWindows(store, "val", 3)
    with pytest.raises(DataError, match=r"split 'test' has no windows: its 1 cases have no outputs"):
        FluidWindows(store, "test", 3)


def test_a_batch_keeps_missing_values_and_masks_targets(tmp_path: Path) -> None:
    schema = Schema(("B_001:FR",), dict.fromkeys(GROUPS, ()) | {"N": ("N_001_p", "N_002_p")})
    state = np.arange(10, dtype=np.float32).reshape(5, 2)
    state[2, 1] = np.nan
    boundary = np.arange(5, dtype=np.float32)[:, None] * 100
    windows = FluidWindows(write_store(tmp_path, schema, {"train": {"c": (boundary, state)}}), "train", history=2)
    batch = collate([windows[k] for k in range(3)])
    nan = float("nan")
    expected = torch.tensor(
        [[[100, 0, 1], [200, 2, 3]], [[200, 2, 3], [300, 4, nan]], [[300, 4, nan], [400, 6, 7]]], dtype=torch.float32
    )
    targets = torch.tensor([[[2, 3], [4, nan]], [[4, nan], [6, 7]], [[6, 7], [8, 9]]], dtype=torch.float32)
    torch.testing.assert_close(batch["x"], expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(batch["target"], targets, rtol=0, atol=0, equal_nan=True)
    assert batch["mask"].dtype == torch.bool
    assert torch.equal(batch["mask"], ~targets.isnan())


def test_windows_go_to_loader_workers(store: Store) -> None:
    windows = FluidWindows(store, "train", 3)
    windows[5]
    copy = pickle.loads(pickle.dumps(windows))
    np.testing.assert_array_equal(copy[5][0], windows[5][0])
    loader = torch.utils.data.DataLoader(
        windows, batch_size=4, num_workers=1, sampler=[3, 2000, 7, 9], collate_fn=collate
    )
    batch = next(iter(loader))
    np.testing.assert_array_equal(batch["x"][1].numpy(), windows[2000][0])
