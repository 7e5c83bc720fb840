"""Which states are copies of set-points: each near miss by itself, and all pairs against a plain search."""

import tracemalloc

import numpy as np
import pytest

from tests.models.fluid.toy_network import SCHEMA, day
from trunkline.models.fluid import copies, statistics
from trunkline.models.fluid.copies import EQUAL, copied_states
from trunkline.models.fluid.schema import GROUPS, Schema
from trunkline.models.fluid.store_writer import write_store

MINUTES, CASES = 240, 3
COPIES = {"N_001_p": "T_001:SP", "E_001_q": "E_001:SNQ"}


def days():
    """Days of a network in which N_001_p copies T_001:SP and E_001_q E_001:SNQ, and the rest moves by itself."""
    out = {}
    for number in range(CASES):
        boundary, state = day(number, MINUTES)
        state[:, at("N_001_p")], state[:, at("E_001_q")] = boundary.T
        out[f"case_{number}"] = (boundary, state)
    return out


def at(name):
    return SCHEMA.states.index(name)


def found(root, cases):
    return copied_states(write_store(root, SCHEMA, {"train": cases}))


def test_copies_and_no_others(tmp_path):
    assert found(tmp_path, days()) == COPIES


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_equal_is_within_a_hundredth_of_a_deviation(tmp_path, share):
    cases = days()
    _, state = cases["case_1"]
    deviation = np.concatenate([boundary[:, 0] for boundary, _ in cases.values()]).std(dtype=np.float64)
    state[7, at("N_001_p")] += share * EQUAL * deviation
    assert ("N_001_p" in found(tmp_path, cases)) == (share < 1)


def test_what_differs_from_its_set_point_now_and_then_is_no_copy(tmp_path):
    cases = days()
    p, q, inlet, inv = (at(name) for name in ("N_001_p", "E_001_q", "P_001_p_in", "P_001_inv"))
    for boundary, state in cases.values():
        state[:, inlet] = boundary[:, 0] + 0.1  # off by a constant, as gauge from absolute pressure
        state[1:, inv] = boundary[:-1, 0]  # a minute late
    cases["case_2"][1][100:130, p] = 4.0  # its device is off for half an hour
    cases["case_0"][1][-1, q] += 5.0
    assert found(tmp_path, cases) == {}


def test_missing_values_contradict_nothing_unless_most_are_missing(tmp_path):
    cases = days()
    for _, state in cases.values():
        state[::3, at("N_001_p")] = np.nan
        state[10:, at("E_001_q")] = np.nan
    assert found(tmp_path, cases) == {"N_001_p": "T_001:SP"}


def test_rows_without_values_cost_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "_VALUES_AT_ONCE", 1 << 16, raising=False)
    count = 100
    rng = np.random.default_rng(0)
    boundary, state = (rng.normal(size=(MINUTES, count)).astype(np.float32) for _ in range(2))
    state[:, 7] = boundary[:, 3]
    state[:5] = np.nan
    schema = Schema(
        tuple(f"T_{k:03d}:SP" for k in range(count)),
        {**dict.fromkeys(GROUPS, ()), "N": tuple(f"N_{k:03d}_p" for k in range(count))},
    )
    store = write_store(tmp_path, schema, {"train": {"case_0": (boundary, state)}})
    tracemalloc.start()
    try:
        assert copied_states(store) == {"N_007_p": "T_003:SP"}
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20, "all pairs in all rows are 9 MiB"


def test_what_never_moves_is_no_copy(tmp_path):
    cases = days()
    for boundary, state in cases.values():
        boundary[:, 0] = state[:, at("N_001_p")] = 5.5
    assert found(tmp_path, cases) == {"E_001_q": "E_001:SNQ"}


def test_of_two_equal_set_points_the_first_is_named(tmp_path):
    cases = days()
    for boundary, _ in cases.values():
        boundary[:, 1] = boundary[:, 0]
    assert found(tmp_path, cases) == {"N_001_p": "T_001:SP"}


def test_of_a_large_network_some_rows_of_every_day_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "_SAMPLE_VALUES", 30 * SCHEMA.num_variables)
    cases = days()
    assert found(tmp_path / "all", cases) == COPIES
    cases["case_2"][1][100:130, at("N_001_p")] = 4.0
    assert found(tmp_path / "some", cases) == {"E_001_q": "E_001:SNQ"}
