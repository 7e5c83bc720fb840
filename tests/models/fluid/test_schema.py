from __future__ import annotations

import json
from pathlib import Path

import pytest

from trunkline.engine.errors import DataError
from trunkline.models.fluid.schema import GROUPS, Device, Schema, devices, kind, parse_column, unit

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
        ("X_north_colour", "X_north", "colour", ""),
        ("P_001_flow_rate", "P_001", "flow_rate", ""),
        ("C_Waidhaus_1_p_in", "C_Waidhaus_1", "p_in", "MPa"),
        ("C_Waidhaus_1_pwr", "C_Waidhaus_1", "pwr", "kW"),
        ("C_Waidhaus_1:SP_out", "C_Waidhaus_1", "SP_out", "MPa"),
        ("N_Bad_Hall_p", "N_Bad_Hall", "p", "MPa"),
        ("P_Bad_Hall_in_t_out", "P_Bad_Hall_in", "t_out", "degC"),
        ("P_p_q_t", "P_p_q", "t", "degC"),
        ("R_001_2_q", "R_001_2", "q", "m3/s"),
    ],
)
def test_a_column_tells_its_device_and_quantity(name: str, device: str, quantity: str, of: str) -> None:
    assert parse_column(name) == (device, quantity)
    assert unit(quantity) == of


def test_a_device_is_of_the_kind_that_its_name_begins_with() -> None:
    assert [kind(device) for device in ("B_001", "C_Waidhaus_1", "T_007")] == ["B", "C", "T"]


def test_devices_know_their_places_in_both_vectors() -> None:
    boundary = ("B_2:FR", "T_001:SNQ", "C_Wald_1:ST", "E_003:SNQ", "C_Wald_1:SP_out")
    groups = dict.fromkeys(GROUPS, ()) | {
        "B": ("B_1_p_in", "B_2_p_in", "B_1_q_out", "B_2_q_out"),
        "C": ("C_Wald_1_p_in", "C_Wald_1_pwr"),
        "N": ("N_Wald_1_p",),
        "T&E": ("E_003_p", "T_001_p", "E_003_q"),
    }
    schema = Schema(boundary, groups)
    assert devices(schema) == (
        Device("B_2", "B", (0,), (1, 3)),
        Device("T_001", "T", (1,), (8,)),
        Device("C_Wald_1", "C", (2, 4), (4, 5)),
        Device("E_003", "E", (3,), (7, 9)),
        Device("B_1", "B", (), (0, 2)),
        Device("N_Wald_1", "N", (), (6,)),
    )


@pytest.mark.parametrize(
    "name",
    [
        *("pressure", "B_001", "B_001:", ":FR", "_001_p", "B_001 _p", ""),
        *("C_Waidhaus_1_speed", "P_1_2_colour", "N_Bad_Hall_in", "B_001_x:"),
    ],
)
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
