from __future__ import annotations

import json
from pathlib import Path

import pytest

from trunkline.engine.errors import DataError
from trunkline.models.fluid.schema import GROUPS, Schema, parse_column, unit

GROUPED = {"B": ("B_001_p_in", "B_001_p_out"), "C": ("C_001_pwr",), "H": (), "N": ("N_001_p",), "P": ("P_001_inv",)} | {
    "R": ("R_001_q",),
    "T&E": ("T_001_p", "E_001_q"),
}
SCHEMA = Schema(("B_001:FR", "T_001:SNQ", "C_001:SP_out"), GROUPED)


def test_the_state_vector_follows_the_files() -> None:
    assert SCHEMA.states == (
        *("B_001_p_in", "B_001_p_out", "C_001_pwr", "N_001_p", "P_001_inv", "R_001_q", "T_001_p", "E_001_q"),
    )
    assert SCHEMA.columns == SCHEMA.boundary + SCHEMA.states
    assert (SCHEMA.num_boundary, SCHEMA.num_states, SCHEMA.num_variables) == (3, 8, 11)
    for group, place in SCHEMA.group_slices.items():
        assert SCHEMA.states[place] == GROUPED[group]
    assert SCHEMA.group_slices["H"] == slice(3, 3)


@pytest.mark.parametrize(
    ("name", "device", "quantity", "of"),
    [
        ("B_001:FR", "B_001", "FR", "-"),
        ("T_007:SP", "T_007", "SP", "MPa"),
        ("E_122:SNQ", "E_122", "SNQ", "m3/s"),
        ("C_023:SP_out", "C_023", "SP_out", "MPa"),
        ("C_023:ST", "C_023", "ST", "-"),
        ("R_010:SPD", "R_010", "SPD", "MPa"),
        ("B_001_p_in", "B_001", "p_in", "MPa"),
        ("P_230_q_out", "P_230", "q_out", "m3/s"),
        ("N_572_t", "N_572", "t", "degC"),
        ("C_001_pwr", "C_001", "pwr", "kW"),
        ("P_001_inv", "P_001", "inv", "m3"),
        ("X_1_colour", "X_1", "colour", ""),
    ],
)
def test_a_column_tells_its_device_and_quantity(name: str, device: str, quantity: str, of: str) -> None:
    assert parse_column(name) == (device, quantity)
    assert unit(quantity) == of


@pytest.mark.parametrize("name", ["pressure", "B_001", "B_001:", ":FR", "_001_p", "B_001 _p", ""])
def test_a_column_of_another_layout_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="rename it"):
        parse_column(name)
    with pytest.raises(DataError, match="rename it"):
        Schema((name,), GROUPED)


def test_a_name_stands_for_one_column() -> None:
    with pytest.raises(DataError, match="'R_001_q' occurs more than once"):
        Schema(("B_001:FR",), GROUPED | {"H": ("R_001_q",)})


def test_groups_are_all_there_and_in_order() -> None:
    with pytest.raises(DataError, match="needs the groups"):
        Schema(("B_001:FR",), dict.fromkeys(reversed(GROUPS), ()))
    with pytest.raises(DataError, match="at least one boundary column and one output column"):
        Schema(("B_001:FR",), dict.fromkeys(GROUPS, ()))


def test_written_and_read_it_is_the_same(tmp_path: Path) -> None:
    SCHEMA.write(tmp_path)
    assert Schema.read(tmp_path) == SCHEMA


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"version": 2}',
        json.dumps(SCHEMA.to_json() | {"boundary": "B_001:FR"}),
        json.dumps(SCHEMA.to_json() | {"groups": {"B": [1]}}),
    ],
)
def test_a_damaged_schema_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "schema.json").write_text(text)
    with pytest.raises(DataError, match=r"schema\.json: cannot be read as a schema"):
        Schema.read(tmp_path)
    with pytest.raises(DataError, match=r"schema\.json: cannot be read as a schema"):
        Schema.read(tmp_path / "absent")
