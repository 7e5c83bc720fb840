"""Names and units as a person reads them."""

import pytest

from trunkline.models.fluid.metrics import units
from trunkline.models.fluid.schema import GROUPS, Schema
from trunkline.models.fluid.words import GROUPS_IN_WORDS, QUANTITIES, in_words, shown_unit


@pytest.mark.parametrize(
    ("column", "words", "unit"),
    [
        ("C_001_p_out", "Compressor C_001: outlet pressure", "MPa"),
        ("B_343_q_in", "Ball valve B_343: inlet flow", "Nm3/s"),
        ("C_002_pwr", "Compressor C_002: power", "kW"),
        ("P_230_inv", "Pipe P_230: linepack", "Nm3"),
        ("R_010_t_out", "Control valve R_010: outlet temperature", "degC"),
        ("N_572_t", "Node N_572: temperature", "degC"),
        ("H_001_q_out", "Short pipe H_001: outlet flow", "Nm3/s"),
        ("T_001_p", "Source T_001: pressure", "MPa"),
        ("E_001:SNQ", "Delivery E_001: set flow", "Nm3/s"),
        ("C_001:SP_out", "Compressor C_001: set outlet pressure", "MPa"),
        ("B_001:FR", "Ball valve B_001: opening", ""),
        ("X_001_rho", "X_001: rho", "?"),
    ],
)
def test_columns_in_words(column, words, unit):
    assert (in_words(column), shown_unit(column)) == (words, unit)


def test_every_unit_and_every_file_has_a_word():
    states = ("P_001_p_in", "P_001_q_in", "P_001_t_in", "P_001_inv", "P_001_pwr")
    assert set(units(Schema(("E_001:SNQ",), {group: states if group == "P" else () for group in GROUPS}))) == set(
        QUANTITIES
    )
    assert set(GROUPS_IN_WORDS) == {"all", *GROUPS}
