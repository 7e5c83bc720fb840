"""Values that no gas network can show: counted column by column, with the worst, over any split."""

import math

import torch

from trunkline.models.fluid.bounds import SLACK, Outside
from trunkline.models.fluid.schema import GROUPS, Schema

GROUPS_HERE = {
    "C": ("C_001_p_out", "C_001_q_in", "C_001_pwr"), "N": ("N_001_t",), "P": ("P_001_inv",), "R": ("R_001_t_out",)
}  # fmt: skip
SCHEMA = Schema(("C_001:ST",), {group: GROUPS_HERE.get(group, ()) for group in GROUPS})
ONES = torch.ones(6)
SOUND = [5.0, -20.0, 0.0, -50.0, 0.0, 150.0]
VALUES = torch.tensor([
    SOUND,
    [-0.1, -1e9, -300.0, -50.5, -1.0, 151.0],
    [5.0, 1e9, -20.0, 190.0, 7.0, -60.0],
    SOUND,
])  # fmt: skip
FOUND = {
    "C_001_pwr": {"values": 2, "worst": -300.0},
    "N_001_t": {"values": 2, "worst": 190.0},
    "R_001_t_out": {"values": 2, "worst": -60.0},
    "C_001_p_out": {"values": 1, "worst": -0.10000000149011612},
    "P_001_inv": {"values": 1, "worst": -1.0},
}


def test_values_are_counted_by_column_and_the_farthest_is_the_worst():
    found = Outside.of(VALUES, SCHEMA, ONES).by_column(SCHEMA)
    assert found == FOUND
    assert list(found) == list(FOUND), "most values first"
    assert "C_001_q_in" not in found, "a flow may have either sign"


def test_what_misses_a_bound_by_rounding_lies_on_it():
    on = torch.tensor([0.0, -20.0, 0.0, -50.0, 0.0, 150.0])
    deviations = torch.tensor([0.5, 10.0, 100.0, 3.0, 1e4, 8.0])
    beyond = torch.tensor([-1.0, 1.0, -1.0, -1.0, -1.0, 1.0]) * SLACK * deviations
    assert Outside.of(on + 0.9 * beyond, SCHEMA, deviations).by_column(SCHEMA) == {}
    found = Outside.of(on + 1.1 * beyond, SCHEMA, deviations).by_column(SCHEMA)
    assert set(found) == set(FOUND)
    tiny = torch.tensor([[-1e-6, 0.0, -1e-6, 0.0, -1e-6, 0.0]])
    assert Outside.of(tiny, SCHEMA, ONES).line(SCHEMA) == ""


def test_parts_add_up_to_the_whole():
    for cut in range(1, 4):
        parts = Outside.of(VALUES[:cut], SCHEMA, ONES) + Outside.of(VALUES[None, cut:], SCHEMA, ONES)
        assert parts.by_column(SCHEMA) == FOUND


def test_the_line_names_three_columns_and_counts_the_others():
    assert Outside.of(VALUES, SCHEMA, ONES).line(SCHEMA) == (
        "8 values outside physical bounds: C_001_pwr 2 (worst -300 kW, bound 0), "
        "N_001_t 2 (worst 190 degC, bound 150), R_001_t_out 2 (worst -60 degC, bound -50), and 2 further columns"
    )
    assert Outside.of(VALUES[[0, 3]], SCHEMA, ONES).line(SCHEMA) == ""


def test_what_is_no_number_is_outside_of_any_bounds():
    values = torch.tensor([SOUND, SOUND, SOUND])
    values[0, 1], values[1, 1], values[2, 2] = math.nan, -math.inf, math.nan
    found = Outside.of(values, SCHEMA, ONES)
    assert found.by_column(SCHEMA) == {
        "C_001_q_in": {"values": 2, "worst": None}, "C_001_pwr": {"values": 1, "worst": None}
    }  # fmt: skip
    assert "C_001_q_in 2 (worst no number)" in found.line(SCHEMA)
