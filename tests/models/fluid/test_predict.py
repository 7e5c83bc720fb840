"""Prediction of a day: where it starts, what it writes, and that a case needs no outputs."""

import json
import shutil

import numpy as np
import polars as pl
import pytest
import torch

from tests.models.fluid.toy_network import SCHEMA, write_toy_case, write_toy_store
from tests.models.fluid.trained_run import write_run
from trunkline.engine.errors import DataError
from trunkline.models.fluid import predict
from trunkline.models.fluid.bounds import SLACK
from trunkline.models.fluid.csv.cases import read_case
from trunkline.models.fluid.predict import nearest_start, own_start, predict_day, start_from_case, write_day
from trunkline.models.fluid.schema import GROUPS
from trunkline.models.fluid.store import Store
from trunkline.models.fluid.trained import load_trained

CPU = torch.device("cpu")
T = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("predict")
    write_toy_store(root / "store")
    write_run(root / "run", root / "store", history=T)
    write_toy_case(root / "case_0007", seed=77)
    shutil.copytree(root / "case_0007", root / "bare")
    for group in GROUPS:
        (root / "bare" / f"{group}.csv").unlink()
    return root


@pytest.fixture(scope="module")
def trained(root):
    return load_trained(root / "run", CPU)


@pytest.fixture(scope="module")
def own_day(root, trained):
    """The toy case and its prediction from its own first minutes."""
    case = read_case(root / "case_0007", SCHEMA)
    return case, predict_day(trained, case.boundary, own_start(case.state, T))


@pytest.fixture
def short_day(monkeypatch):
    """Whole days take seconds; where one would not show more, it ends after 100 minutes."""
    monkeypatch.setattr(predict, "MINUTES", 100)


def scaled(trained, difference):
    return np.abs(difference / trained.model.normalization.state_scale.numpy())


def test_a_day_from_its_own_first_minutes(own_day, trained):
    case, out = own_day
    assert out.shape == (1440, 8)
    assert np.array_equal(out[:T], case.state[:T])
    assert scaled(trained, out - case.state).max() < 0.05, "a linear network under its own boundary"


def test_a_day_from_another_case_s_last_minutes(root, own_day, trained, short_day):
    case, _ = own_day
    start = start_from_case(root / "case_0007", SCHEMA, T, 80)
    assert start.minute == 0
    assert np.array_equal(start.states, case.state[80 - T : 80])
    out = predict_day(trained, case.boundary, start)
    assert out.shape == (100, 8)
    window = np.concatenate([np.repeat(case.boundary[:1], T, axis=0), start.states], axis=1)
    with torch.no_grad():
        want = trained.model(torch.from_numpy(window)[None])[0, -1]
    np.testing.assert_allclose(out[0], want, rtol=1e-5)
    with pytest.raises(DataError, match="--start-minute 2"):
        start_from_case(root / "case_0007", SCHEMA, T, 2)


def test_a_later_set_point_changes_no_earlier_minute(own_day, trained, short_day):
    case, before = own_day
    moved = case.boundary.copy()
    moved[70:] += 0.1
    after = predict_day(trained, moved, own_start(case.state, T))
    assert np.array_equal(after[:70], before[:70])
    assert (after[70] != before[70]).all()


def test_the_nearest_start_is_a_training_minute_with_that_boundary(trained):
    store = Store.open(trained.data.store)
    case = store.cases("train")[3]
    boundary, state = store.boundary("train", case), store.state("train", case)
    held = np.flatnonzero((boundary == boundary[100]).all(axis=1))
    start = nearest_start(store, SCHEMA, boundary[100] + 1e-4, np.ones(2), T)
    assert np.array_equal(start.states, state[held[-1] - T + 1 : held[-1] + 1])
    assert start.minute == 0


def test_written_files_read_back_as_they_were(tmp_path, root):
    case = read_case(root / "case_0007", SCHEMA)
    write_day(tmp_path, case.day, case.state, SCHEMA)
    shutil.copy(root / "case_0007" / "Boundary.csv", tmp_path)
    again = read_case(tmp_path, SCHEMA)
    assert again.day == case.day
    assert np.array_equal(again.state, case.state)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["B", "Boundary", "H", "N", "P", "T&E"]
    for group in SCHEMA.present_groups:
        want = (root / "case_0007" / f"{group}.csv").read_text().splitlines()
        got = (tmp_path / f"{group}.csv").read_text().splitlines()
        assert got[0] == want[0], "columns in the input's order"
        assert [line.split(",")[0] for line in got] == [line.split(",")[0] for line in want]


@pytest.mark.parametrize("case", ["case_0007", "bare"])
def test_the_launcher_writes_files_and_pictures(root, tmp_path, capsys, monkeypatch, case):
    from trunkline.launchers.predict import main

    if case == "bare":
        monkeypatch.setattr(predict, "MINUTES", 100)
    arguments = ["--run", str(root / "run"), "--case", str(root / case), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--device", "cpu"]) == 0
    out = tmp_path / "out"
    assert {path.stem for path in out.glob("*.csv")} == {"B", "H", "N", "P", "T&E"}
    for group in SCHEMA.present_groups:
        assert pl.read_csv(out / f"{group}.csv").shape == (predict.MINUTES, 1 + len(SCHEMA.groups[group]))
    for picture in ("variables.png", "map.png"):
        assert (out / picture).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    record = json.loads((out / "prediction.json").read_text())
    printed = capsys.readouterr().out
    assert record["start"] in printed
    assert "bounds: every predicted value lies within the physical ones" in printed
    assert record["outside_bounds"]["columns"] == {}
    if case == "bare":
        assert "nearest" in record["start"]
        assert record["scores"] is None
        assert record["first_predicted_minute"] == 1
    else:
        assert record["scores"]["surrogate"]["rmse"] < 0.05 < record["scores"]["persistence"]["rmse"]
        assert record["first_predicted_minute"] == T + 1


def test_values_outside_physical_bounds_are_counted_and_written_as_they_are(
    root, trained, tmp_path, capsys, monkeypatch
):
    from trunkline.launchers.predict import main

    monkeypatch.setattr(predict, "MINUTES", 100)
    case, out = tmp_path / "case_0001", tmp_path / "out"
    case.mkdir()
    lines = (root / "bare" / "Boundary.csv").read_text().splitlines()
    cells = [line.split(",") for line in lines[1:]]
    lost = [",".join([time, "-900", flow]) for time, _, flow in cells]  # a pressure that no source has
    (case / "Boundary.csv").write_text("\n".join([lines[0], *lost]) + "\n")
    assert main(["--run", str(root / "run"), "--case", str(case), "--out", str(out), "--device", "cpu"]) == 0
    record = json.loads((out / "prediction.json").read_text())
    bounds = {"p": (0, np.inf), "inv": (0, np.inf), "t": (-50, 150)}
    want = {}
    for group in SCHEMA.present_groups:
        for name, values in pl.read_csv(out / f"{group}.csv").drop("TIME").to_dict().items():
            low, high = bounds.get(name.split("_")[2], (-np.inf, np.inf))
            beyond = np.maximum(low - values.to_numpy(), values.to_numpy() - high)
            slack = SLACK * trained.model.normalization.state_scale[SCHEMA.states.index(name)].item()
            if (beyond > slack).any():
                want[name] = {
                    "values": int((beyond > slack).sum()),
                    "worst": pytest.approx(values[int(beyond.argmax())]),
                }
    assert len(want) > 2
    assert record["outside_bounds"]["columns"] == want
    assert record["day"] == "2025-01-31"
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bounds: ")]
    assert f"{sum(of['values'] for of in want.values()):,} values outside physical bounds" in line


def test_where_no_variable_moves_none_is_drawn_unless_it_is_named(root, tmp_path, capsys, short_day):
    from trunkline.launchers.predict import main

    write_run(tmp_path / "run", root / "store", linear_skip=False)  # a head of zeros says that nothing changes
    out = tmp_path / "out"
    arguments = ["--run", str(tmp_path / "run"), "--case", str(root / "bare"), "--out", str(out), "--device", "cpu"]
    assert main(arguments) == 0
    assert "variables.png is not drawn, since no variable moves" in capsys.readouterr().out
    assert not (out / "variables.png").exists()
    assert (out / "map.png").exists()
    assert main([*arguments, "--variables", "N_001_p"]) == 0
    assert (out / "variables.png").exists()


def test_a_prediction_is_written_again_over_itself_with_its_set_points_beside_it(root, tmp_path, short_day):
    from trunkline.launchers.predict import main

    arguments = ["--run", str(root / "run"), "--case", str(root / "bare"), "--out", str(tmp_path), "--device", "cpu"]
    assert main(arguments) == 0
    shutil.copy(root / "bare" / "Boundary.csv", tmp_path)
    (tmp_path / "N.csv").unlink()
    assert main(arguments) == 0
    assert (tmp_path / "N.csv").exists()


def test_where_there_is_no_room_for_a_day_is_said(root, tmp_path, capsys):
    from trunkline.launchers.predict import main

    (tmp_path / "B.csv").symlink_to("/dev/full")
    assert main(["--run", str(root / "run"), "--case", str(root / "bare"), "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert f"error: --out {tmp_path}: cannot be written (No space left on device (os error 28)): make room" in printed


def test_what_a_user_gets_wrong_is_named(root, tmp_path, capsys):
    from trunkline.launchers.predict import main

    run, case, out = str(root / "run"), str(root / "bare"), str(tmp_path / "out")
    other = str(tmp_path / "other")
    shutil.copytree(case, other)
    wrong = {
        "no such output column": ["--run", run, "--case", case, "--out", out, "--variables", "N_001_x"],
        "is a case's folder, whose files": ["--run", run, "--case", case, "--out", case],
        "would be overwritten": ["--run", run, "--case", case, "--start", other, "--out", other],
        "Boundary.csv": ["--run", run, "--case", str(tmp_path), "--out", out],
        "no prepared data set": ["--run", run, "--case", case, "--out", out, "--store", str(tmp_path)],
        "not the folder of a run": ["--run", str(tmp_path), "--case", case, "--out", out],
        "--device nowhere": ["--run", run, "--case", case, "--out", out, "--device", "nowhere"],
    }
    for message, arguments in wrong.items():
        assert main(arguments) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ")
        assert message in printed
