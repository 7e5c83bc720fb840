"""What columns and units are called where a person reads them.

    in_words("C_001_p_out")     "Compressor C_001: outlet pressure"
    shown_unit("C_001_q_in")    "Nm3/s"

Flows and linepack are normal cubic metres (0 degC, 101.325 kPa). Column names, and metrics named after a unit, keep its
plain name, "m3/s", so that a run can be compared with older ones.
"""

from __future__ import annotations

from trunkline.models.fluid.schema import kind, parse_column, unit

QUANTITIES = {"MPa": "pressure", "m3/s": "flow", "degC": "temperature", "kW": "power", "m3": "linepack"}
"""What is measured in a unit, in the order in which tables show them."""
_SHOWN = {"m3/s": "Nm3/s", "m3": "Nm3", "-": "", "": "?"}
_DEVICES = {
    "B": "Ball valve", "C": "Compressor", "H": "Short pipe", "N": "Node", "P": "Pipe", "R": "Control valve",
    "T": "Source", "E": "Delivery",
}  # fmt: skip
GROUPS_IN_WORDS = {
    "all": "all", "B": "ball valves", "C": "compressors", "H": "short pipes", "N": "nodes", "P": "pipes",
    "R": "control valves", "T&E": "sources and deliveries",
}  # fmt: skip
"""The output files, by what they are of."""
_SIDES = {"in": "inlet", "out": "outlet"}
_SET_POINTS = {
    "SNQ": "set flow", "SP": "set pressure", "SP_out": "set outlet pressure", "SPD": "set outlet pressure",
    "FR": "opening", "ST": "on or off",
}  # fmt: skip


def unit_in_words(name: str) -> str:
    """ "Nm3/s" of "m3/s"; empty of what has no dimension."""
    return _SHOWN.get(name, name)


def shown_unit(column: str) -> str:
    """The unit of a column, as it is shown."""
    return unit_in_words(unit(parse_column(column)[1]))


def in_words(column: str) -> str:
    """Kind and name of the device, and what is measured there. What has no word keeps its code."""
    device, quantity = parse_column(column)
    base, _, side = quantity.partition("_")
    what = _SET_POINTS.get(quantity) or " ".join(
        filter(None, [_SIDES.get(side, side), QUANTITIES.get(unit(quantity), base)])
    )
    return f"{_DEVICES.get(kind(device), '')} {device}: {what}".lstrip()
