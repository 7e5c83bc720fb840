"""Evaluation: which minutes are scored, against scores worked out apart from it; the files it writes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.models.fluid.toy_network import SCHEMA, day, write_toy_store
from tests.models.fluid.trained_run import write_run
from trunkline.engine.errors import DataError
from trunkline.launchers.evaluate import main
from trunkline.models.fluid.evaluate import HORIZONS, evaluate
from trunkline.models.fluid.evaluation_report import write_report
from trunkline.models.fluid.plots import colours_of, plot_evaluation
from trunkline.models.fluid.relative_errors import LEAST, RESOLUTION
from trunkline.models.fluid.store import Store
from trunkline.models.fluid.store_writer import write_store
from trunkline.models.fluid.tally import Tally, Yardstick, mean_by_minute
from trunkline.models.fluid.trained import load_trained

CPU = torch.device("cpu")
T, MINUTES = 3, 480
SIX = ("surrogate", "ridge", "ridge with switches", "ridge + MLP", "graph network", "persistence")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluate")
    write_toy_store(root / "store", MINUTES, cases=(6, 2, 3))
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
    hour = [c[r + T : r + T + 60] - c[r + T - 1] for c in cases for r in range(0, MINUTES - T - 60 + 1, 60)]
    six_hours = [c[T : T + 360] - c[T - 1] for c in cases]
    whole = [c[T:] - c[T - 1] for c in cases]
    for horizon, errors in zip(HORIZONS, (one, hour, six_hours, whole), strict=True):
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
    assert result.baselines["ridge + MLP"]["steps"] > 0
    assert list(evaluate(trained, store, "test", with_ridge=False, horizons=["1 minute"]).errors["1 minute"]) == [
        "surrogate",
        "ridge + MLP",
        "persistence",
    ], "the network is kept by now"


def test_the_report_says_how_each_baseline_was_fitted(trained, store, tmp_path):
    options = {"horizons": ["60 minutes"], "baselines": ["persistence", "ridge", "mlp"], "baseline_minutes": 0.002}
    write_report(evaluate(trained, store, "test", **options), trained, tmp_path)
    facts = json.loads((tmp_path / "evaluation.json").read_text())["baselines"]
    assert list(facts) == ["ridge", "ridge + MLP"], "persistence has none"
    assert {"penalty", "noise", "seconds", "threads", "device"} <= set(facts["ridge"])
    ridge, network = facts.values()
    assert network["minutes"] == 0.002
    assert network["days"] == 6
    assert network["steps"] > 0
    assert network["threads"] == torch.get_num_threads()
    lines = (tmp_path / "evaluation.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("- ridge: ")]
    assert line.startswith(
        f"- ridge: penalty {ridge['penalty']:g}, noise 0, fitted in {ridge['seconds']:.3g} s altogether"
    )
    (line,) = [line for line in lines if line.startswith("- ridge + MLP: ")]
    assert line.startswith(f"- ridge + MLP: 0.002 min of training allowed, {network['steps']:,} steps, the best after ")
    assert ", 6 training days, fitted in " in line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--no-ridge", "--baselines", "persistence", "ridge"],
            "--no-ridge leaves out what --baselines ridge asks for",
        ),
        (["--no-ridge", "--baselines", "switches"], "--no-ridge leaves out what --baselines switches asks for"),
        (["--baseline-minutes", "5"], "--baseline-minutes 5: --baselines asks for no network"),
        (["--baseline-minutes", "0.5", "--baselines", "ridge"], "add mlp or graph to --baselines"),
    ],
)
def test_flags_that_contradict_one_another_are_named(trained, tmp_path, capsys, flags, message):
    from trunkline.launchers.evaluate import main

    run = ["--run", str(trained.folder.parent), "--out", str(tmp_path), "--device", "cpu"]
    assert main([*run, "--horizons", "60 minutes", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "evaluation.json").exists()


def test_report_and_picture(result, trained, tmp_path):
    text = write_report(result, trained, tmp_path)
    names = ["surrogate", "ridge", "persistence"]
    lines = text.splitlines()
    assert lines[1].split() == names
    assert [line for line in lines if line in HORIZONS] == list(HORIZONS)
    assert lines[-1 - len(HORIZONS)].split() == ["horizon", *names, "surrogate", "/", "best", "other"]
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["copied_from_set_points"] == {}
    assert record["scores_with_copies"] == record["scores"]
    for horizon in HORIZONS:
        for name in names:
            scores = record["scores"][horizon][name]
            assert scores["normalised"]["all"]["rmse"] == pytest.approx(rmse(result, horizon, name))
            assert set(scores["physical"]["P"]) == {"MPa", "m3"}
    markdown = (tmp_path / "evaluation.md").read_text()
    assert f"{rmse(result, '60 minutes', 'surrogate'):.4g}" in markdown
    assert "All 8 output columns are scored" in markdown
    assert "| sources and deliveries, flow, MAE (Nm3/s) |" in markdown
    assert "m3/s" not in markdown.replace("Nm3/s", "")
    plot_evaluation(result, SCHEMA, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def copying(tmp_path_factory):
    """Two of the eight states copy a set-point; the other six, and persistence, are known by hand."""
    root = tmp_path_factory.mktemp("copying")
    splits, seed = {}, 0
    for split, count in (("train", 3), ("test", 2)):
        splits[split] = {}
        for number in range(count):
            boundary, state = day(seed := seed + 1, 240)
            state[:, COPIED] = boundary
            splits[split][f"case_{number}"] = (boundary, state)
    write_store(root / "store", SCHEMA, splits)
    write_run(root / "run", root / "store", history=T)
    trained = load_trained(root / "run", CPU)
    result = evaluate(trained, Store.open(root / "store"), "test", with_ridge=False)
    states = [state for _, state in splits["test"].values()]
    windows = [(c[r + T - 1], c[r + T : r + T + 60]) for c in states for r in range(0, 240 - T - 60 + 1, 60)]
    last, truth = (np.stack(part).astype(np.float64) for part in zip(*windows))
    return trained, result, np.broadcast_to(last[:, None], truth.shape), truth


COPIED = [SCHEMA.states.index(name) for name in ("N_001_p", "E_001_q")]
OTHERS = [k for k in range(8) if k not in COPIED]


def test_no_score_counts_what_only_copies_a_set_point(copying):
    trained, result, last, truth = copying
    assert result.copied == {"N_001_p": "T_001:SP", "E_001_q": "E_001:SNQ"}
    error = last - truth
    scaled = error / trained.model.normalization.state_scale.numpy()
    for with_copies, columns in ((False, OTHERS), (True, list(range(8)))):
        scores = result.scores(SCHEMA, with_copies)["60 minutes"]["persistence"]
        want = np.square(scaled[..., columns]).mean()
        assert scores["normalised"]["all"]["mse"] == pytest.approx(want, rel=1e-4)
    scores = result.scores(SCHEMA)["60 minutes"]["persistence"]
    assert "T&E" not in scores["normalised"], "its one column is a copy"
    pressures = [k for k in OTHERS if "_p" in SCHEMA.states[k]]
    assert scores["physical"]["all"]["MPa"]["mae"] == pytest.approx(np.abs(error[..., pressures]).mean(), rel=1e-4)
    by_minute = result.by_minute["60 minutes"]["persistence"]
    np.testing.assert_allclose(by_minute, np.square(scaled[..., OTHERS]).mean((0, 2)), rtol=1e-4)
    sums = result.tallies["60 minutes"]["persistence"].absolute_by_minute
    assert set(sums) == {"MPa", "m3/s", "degC", "m3"}
    np.testing.assert_allclose(mean_by_minute(sums["MPa"]), np.abs(error[..., pressures]).mean((0, 2)), rtol=1e-4)


def test_medians_and_copies_stand_in_the_report(copying, tmp_path):
    trained, result, last, truth = copying
    write_report(result, trained, tmp_path)
    record = json.loads((tmp_path / "evaluation.json").read_text())
    markdown = (tmp_path / "evaluation.md").read_text()
    for unit, letter, what in (("MPa", "p", "pressure"), ("m3/s", "q", "flow")):
        columns = [k for k in OTHERS if f"_{letter}" in SCHEMA.states[k]]
        error, size = np.abs(last - truth)[..., columns], np.abs(truth[..., columns])
        want = np.median((error / size)[size >= LEAST[unit]])
        found = record["relative_errors"]["60 minutes"]["persistence"][unit]
        assert found["median"] == pytest.approx(want, rel=1.1 * RESOLUTION)
        assert found["values"] + found["left_out"] == error.size
        assert found["left_out"] == (size < LEAST[unit]).sum()
        assert f"| {what}, median relative error (%) | " in markdown
    assert record["copied_from_set_points"] == result.copied
    for key, with_copies in (("scores", False), ("scores_with_copies", True)):
        want = result.scores(SCHEMA, with_copies)["60 minutes"]["persistence"]["normalised"]["all"]["rmse"]
        assert record[key]["60 minutes"]["persistence"]["normalised"]["all"]["rmse"] == pytest.approx(want)
    assert "2 of 8 output columns only copy a set-point" in markdown
    assert "`N_001_p` (`T_001:SP`), `E_001_q` (`E_001:SNQ`)" in markdown
    assert markdown.index("## Physical units") < markdown.index("## Normalised")


def test_predictions_outside_bounds_are_counted_in_the_report(copying, tmp_path):
    trained, result, _, truth = copying
    write_report(result, trained, tmp_path)
    assert "None: no pressure, power or linepack below 0" in (tmp_path / "evaluation.md").read_text()
    low = torch.from_numpy(truth).float()
    low[0, :5, SCHEMA.states.index("P_001_inv")] = -300.0
    yardstick = Yardstick(trained.model.normalization, SCHEMA, result.copied)
    tallies = {"60 minutes": {"surrogate": Tally.of(low, torch.from_numpy(truth).float(), yardstick)}}
    write_report(replace(result, tallies=tallies), trained, tmp_path)
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["outside_bounds"]["60 minutes"]["surrogate"] == {"P_001_inv": {"values": 5, "worst": -300.0}}
    line = "- 60 minutes, surrogate: 5 values outside physical bounds: P_001_inv 5 (worst -300 Nm3, bound 0)."
    assert line in (tmp_path / "evaluation.md").read_text().splitlines()


def test_a_horizon_longer_than_the_cases_is_left_out_or_named(copying):
    trained, result, *_ = copying
    assert list(result.tallies) == ["1 minute", "60 minutes", "whole day"], "of cases of four hours"
    with pytest.raises(DataError, match=r"cases of 240 minutes are too short for 6 hours after the 3 that"):
        evaluate(trained, Store.open(trained.data.store), "test", with_ridge=False, horizons=["6 hours"])


def test_six_forecasters_have_a_column_and_a_colour_each(copying, tmp_path):
    trained, result, *_ = copying
    tallies = {
        horizon: dict.fromkeys((*SIX, "another", "and another"), of["persistence"])
        for horizon, of in result.tallies.items()
    }
    many = replace(result, tallies=tallies)
    write_report(many, trained, tmp_path)
    plot_evaluation(many, SCHEMA, tmp_path / "x.png")
    assert f"|  | {' | '.join([*SIX, 'another', 'and another'])} |" in (tmp_path / "evaluation.md").read_text()
    assert len(set(colours_of([*SIX, "another", "and another"]).values())) == 8
    plot_evaluation(replace(many, tallies={"1 minute": tallies["1 minute"]}), SCHEMA, tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size < (tmp_path / "x.png").stat().st_size, "bars alone"


def test_a_split_without_outputs_and_a_foreign_store_are_named(trained, store, tmp_path):
    other = {"train": {"case_1": day(1, 240)}, "test": {"case_1": (day(1, 240)[0], None)}}
    with pytest.raises(DataError, match="no case of split 'test' has outputs"):
        evaluate(trained, write_store(tmp_path / "a", SCHEMA, other), "test")
    foreign = type(SCHEMA)(("T_009:SP", "E_001:SNQ"), SCHEMA.groups)
    with pytest.raises(DataError, match="other columns"):
        evaluate(trained, write_store(tmp_path / "b", foreign, other), "test")


def test_a_data_set_that_was_prepared_anew_since_training_is_named(tmp_path, capsys):
    place = tmp_path / "store"
    write_toy_store(place, 240)
    write_run(tmp_path / "run", place)
    evaluate_it = ["--run", str(tmp_path / "run"), "--horizons", "1 minute"]
    assert main(evaluate_it) == 0
    assert "has changed" not in capsys.readouterr().out
    write_toy_store(place, 240, cases=(7, 2, 2))
    assert main(evaluate_it) == 0
    said = "".join(capsys.readouterr())
    assert f"warning: {place} has changed since {tmp_path / 'run/best'} was trained" in said
    assert main([*evaluate_it, "--store", str(place)]) == 0
    assert "has changed" not in capsys.readouterr().out
