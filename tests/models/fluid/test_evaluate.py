"""Evaluation: which minutes are scored, against scores worked out apart from it; the files it writes."""

import json

import numpy as np
import pytest
import torch

from tests.models.fluid.toy_network import SCHEMA, day, write_toy_store
from tests.models.fluid.trained_run import write_run
from trunkline.engine.errors import DataError
from trunkline.models.fluid.evaluate import HORIZONS, evaluate
from trunkline.models.fluid.evaluation_report import write_report
from trunkline.models.fluid.plots import plot_evaluation
from trunkline.models.fluid.store import Store
from trunkline.models.fluid.store_writer import write_store
from trunkline.models.fluid.trained import load_trained

CPU = torch.device("cpu")
T = 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    write_toy_store(root / "store", cases=(6, 2, 3))
    write_run(root / "run", root / "store", history=T)
    return load_trained(root / "run", CPU)


@pytest.fixture(scope="module")
def store(trained):
    return Store.open(trained.data.store)


@pytest.fixture(scope="module")
def result(trained, store):
    return evaluate(trained, store, "test")


def rmse(result, horizon, name):
    return result.errors[horizon][name].scores(SCHEMA)["normalised"]["all"]["rmse"]


def test_persistence_by_hand(result, trained, store):
    scale = trained.model.normalization.state_scale.numpy()
    cases = [np.asarray(store.state("test", case)) / scale for case in store.cases("test")[:2]]
    assert result.cases == store.cases("test")[:2], "the case without outputs cannot be scored"
    one = [c[T:] - c[T - 1 : -1] for c in cases]
    hour = [c[r + T : r + T + 60] - c[r + T - 1] for c in cases for r in range(0, 240 - T - 60 + 1, 60)]
    whole = [c[T:] - c[T - 1] for c in cases]
    for horizon, errors in zip(HORIZONS, (one, hour, whole)):
        want = np.sqrt(np.square(np.stack(errors)).mean())
        assert rmse(result, horizon, "persistence") == pytest.approx(want, rel=1e-4)
    by_minute = np.square(np.stack(hour)).mean(axis=(0, 2))
    np.testing.assert_allclose(result.by_minute["60 minutes"]["persistence"], by_minute, rtol=1e-4)


def test_a_linear_network_is_what_ridge_and_its_skip_predict(result):
    for horizon in HORIZONS:
        for name in ("surrogate", "ridge"):
            assert rmse(result, horizon, name) < 0.03 * rmse(result, horizon, "persistence")


def test_batches_change_nothing(result, trained, store):
    again = evaluate(trained, store, "test", batch_size=7, with_ridge=False)
    for horizon in HORIZONS:
        assert "ridge" not in again.errors[horizon]
        # within the rounding of fp32, which is all that is left of the error in the smallest of them
        assert rmse(again, horizon, "surrogate") == pytest.approx(
            rmse(result, horizon, "surrogate"), rel=1e-3, abs=1e-7
        )


def test_a_history_of_one_starts_from_the_same_minutes_as_ridge(tmp_path, store):
    write_run(tmp_path, store.root, history=1, linear_skip=False)
    result = evaluate(load_trained(tmp_path, CPU), store, "val", horizons=["60 minutes"])
    assert rmse(result, "60 minutes", "surrogate") == pytest.approx(rmse(result, "60 minutes", "persistence"), rel=1e-4)


def test_baselines_that_are_asked_for(trained, store):
    options = {"horizons": ["60 minutes"], "baselines": ["persistence", "mlp"], "baseline_minutes": 0.001}
    result = evaluate(trained, store, "test", **options)
    assert list(result.errors["60 minutes"]) == ["surrogate", "ridge + MLP", "persistence"]
    assert list(evaluate(trained, store, "test", with_ridge=False, horizons=["1 minute"]).errors["1 minute"]) == [
        "surrogate",
        "ridge + MLP",
        "persistence",
    ], "the network is kept by now"


def test_report_and_picture(result, trained, tmp_path):
    text = write_report(result, trained, tmp_path)
    assert text.splitlines()[0].split()[:4] == ["horizon", "surrogate", "ridge", "persistence"]
    assert len(text.splitlines()) == 4
    record = json.loads((tmp_path / "evaluation.json").read_text())
    for horizon in HORIZONS:
        for name in ("surrogate", "ridge", "persistence"):
            scores = record["scores"][horizon][name]
            assert scores["normalised"]["all"]["rmse"] == pytest.approx(rmse(result, horizon, name))
            assert set(scores["physical"]["P"]) == {"MPa", "m3"}
    markdown = (tmp_path / "evaluation.md").read_text()
    assert f"{rmse(result, '60 minutes', 'surrogate'):.4g}" in markdown
    assert "| T&E | m3/s |" in markdown
    plot_evaluation(result, SCHEMA, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_split_without_outputs_and_a_foreign_store_are_named(trained, store, tmp_path):
    other = {"train": {"case_1": day(1, 240)}, "test": {"case_1": (day(1, 240)[0], None)}}
    with pytest.raises(DataError, match="no case of split 'test' has outputs"):
        evaluate(trained, write_store(tmp_path / "a", SCHEMA, other), "test")
    foreign = type(SCHEMA)(("T_009:SP", "E_001:SNQ"), SCHEMA.groups)
    with pytest.raises(DataError, match="other columns"):
        evaluate(trained, write_store(tmp_path / "b", foreign, other), "test")
