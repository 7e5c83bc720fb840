"""Which variables are chosen for a picture, and that pictures come out for odd networks too."""

import numpy as np
import pytest

from tests.models.fluid.toy_network import SCALE, SCHEMA, day
from trunkline.models.fluid.plots import PredictedDay, most_moving, plot_map, plot_variables, said_errors
from trunkline.models.fluid.schema import GROUPS, Schema

PNG = b"\x89PNG\r\n\x1a\n"


def predicted(truth=True):
    boundary, state = day(3, 200)
    prediction, persistence = state + 0.01 * SCALE.astype(np.float32), np.repeat(state[:1], 200, axis=0)
    return PredictedDay(prediction, persistence, state if truth else None, boundary, 3)


def test_most_moving_are_the_largest_moves_without_repeats():
    out = predicted()
    moves = out.truth.std(0) / SCALE
    order = [SCHEMA.states[k] for k in np.argsort(-moves)]
    assert most_moving(out, SCHEMA, SCALE, 1) == order[:1]
    assert len(most_moving(out, SCHEMA, SCALE, 4)) == 4
    pressures = [name for name in most_moving(out, SCHEMA, SCALE, 8) if name.endswith(("_p", "_p_in"))]
    assert len(pressures) == 2, "at most two of a quantity"
    twin = SCHEMA.states.index("N_002_p")
    out.truth[:, twin] = 3 * out.truth[:, SCHEMA.states.index("N_001_p")]
    chosen = most_moving(out, SCHEMA, SCALE, 8)
    assert not {"N_001_p", "N_002_p"} <= set(chosen), "the same signal twice"


def test_each_kind_of_device_comes_before_a_second_of_one():
    names = ("N_001_p", "N_002_p", "N_003_q", "N_004_q"), ("C_001_p_out", "C_001_pwr"), ("P_001_t_in",)
    schema = Schema(("T_001:SP",), {**dict.fromkeys(GROUPS, ()), "N": names[0], "C": names[1], "P": names[2]})
    deviations = dict(zip(schema.states, (2.0, 7.0, 6.0, 5.0, 4.0, 3.0, 1.0)))  # C, then N, then P
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(4000, 7)) * list(deviations.values())
    out = PredictedDay(truth, truth, truth, np.ones((4000, 1)), 0)
    assert list(deviations) == ["C_001_p_out", "C_001_pwr", *names[0], "P_001_t_in"]
    chosen = most_moving(out, schema, np.ones(7), 7)
    assert chosen == ["C_001_pwr", "N_001_p", "P_001_t_in", "N_002_p", "N_003_q", "N_004_q"], "C_001_p_out is a third p"


def test_what_a_set_point_shows_already_is_not_chosen():
    out = predicted()
    chosen = most_moving(out, SCHEMA, SCALE, 8)
    out.truth[:, SCHEMA.states.index(chosen[0])] = 40 - 3 * out.boundary[:, 1]
    assert chosen[0] not in most_moving(out, SCHEMA, SCALE, 8)
    out.boundary[:, 1] = 7.0  # a set-point that stands still shows nothing
    assert chosen[0] in most_moving(out, SCHEMA, SCALE, 8)


def test_where_every_variable_follows_a_set_point_some_are_chosen_all_the_same():
    out = predicted()
    for column in range(8):
        out.truth[:, column] = (column + 1) * SCALE[column] * out.boundary[:, column % 2]
    chosen = most_moving(out, SCHEMA, SCALE, 8)
    assert len(chosen) == 2, "one for each signal"
    assert {SCHEMA.states.index(name) % 2 for name in chosen} == {0, 1}


def test_each_panel_says_both_errors_of_the_predicted_minutes():
    out = predicted()
    column = SCHEMA.states.index("B_001_q_in")
    out.truth[50, column] = np.nan
    errors = [
        np.nanmean(np.abs(values[3:, column].astype(float) - out.truth[3:, column]))
        for values in (out.prediction, out.persistence)
    ]
    assert errors[0] == pytest.approx(0.2, rel=1e-3)
    (line,) = said_errors(out, column)
    assert line == f"mean absolute error {errors[0]:.3g}, of persistence {errors[1]:.3g}"
    assert said_errors(predicted(truth=False), column) == []
    out.truth[:, column] = np.nan
    assert said_errors(out, column) == []


def test_a_variable_that_stands_still_is_not_chosen():
    out = predicted()
    out.truth[:] = out.truth[0]
    assert most_moving(out, SCHEMA, SCALE, 3) == []


@pytest.mark.parametrize("truth", [True, False])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_variables_are_drawn(tmp_path, truth, count):
    plot_variables(predicted(truth), list(SCHEMA.states[:count]), SCHEMA, tmp_path / "x.png", "a day")
    assert (tmp_path / "x.png").read_bytes()[:8] == PNG


NODES = [{"name": f"N_{k:03d}", "x_km": 10.0 * k, "y_km": float(k % 3)} for k in range(1, 5)]
MAPS = {
    "whole": {
        "nodes": NODES,
        "pipes": [{"name": "P_001", "from": "N_001", "to": "N_002"}],
        "devices": {
            "C": [{"name": "C_001", "from": "N_002", "to": "N_003"}],
            "E": [{"name": "E_001", "node": "N_004"}],
        },
    },
    "no devices": {"nodes": NODES, "pipes": []},
    "one node": {"nodes": NODES[:1]},
    "an edge to nowhere": {"nodes": NODES, "pipes": [{"name": "P_001", "from": "N_001", "to": "N_009"}]},
    "hundreds of nodes": {
        "nodes": [{"name": f"N_{k:03d}", "x_km": k % 20, "y_km": k // 20} for k in range(1, 300)],
        "pipes": [{"from": f"N_{k:03d}", "to": f"N_{k + 1:03d}"} for k in range(1, 299)],
    },
}


@pytest.mark.parametrize("kind", MAPS)
def test_maps_are_drawn(tmp_path, kind):
    values = {node["name"]: float(k) for k, node in enumerate(MAPS[kind]["nodes"])}
    assert plot_map(MAPS[kind], values, "error (kPa)", tmp_path / "map.png", "title")
    assert (tmp_path / "map.png").read_bytes()[:8] == PNG


def test_a_network_without_places_has_no_map(tmp_path):
    assert not plot_map({"nodes": [{"name": "N_001"}]}, {"N_001": 1.0}, "", tmp_path / "map.png", "")
    assert not (tmp_path / "map.png").exists()
