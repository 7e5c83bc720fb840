"""Schema: which columns a network's files hold, in which order.

Everything else about V is derived from it.

GROUPS                     the output files, in the order in which their columns make the state vector
MINUTES                    rows of an output file: one day, 0:01 ... 24:00
Schema                     boundary and output columns of a network
devices(schema)            each device with its places in the boundary and in the state vector
parse_column(name)         "B_001_p_in" or "B_001:FR" -> (device "B_001", quantity "p_in" or "FR")
kind(device)               "B_001" -> "B"
unit(quantity)             "p_in" -> "MPa"
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from trunkline.engine.errors import DataError
from trunkline.engine.machine.reading import read_json, reason

GROUPS = ("B", "C", "H", "N", "P", "R", "T&E")
BOUNDARY = "Boundary"
MINUTES = 1440

_VERSION = 1
_MAX_BYTES = 64 << 20
_COLUMN_LAYOUTS = (
    re.compile(r"([^_:\s]+_[^:\s]+):(\S+)"),  # B_001:FR, C_Waidhaus_1:ST
    re.compile(r"([^_:\s]+_[^:\s]+)_((?:p|q|t|pwr|inv)(?:_in|_out)?)"),  # B_001_p_in, C_Waidhaus_1_p_in
    re.compile(r"([^_:\s]+_\d+)_([^\d_:\s][^:\s]*)"),  # another quantity: P_001_flow_rate
    re.compile(r"([^_:\s]+_[^_:\s]+)_([^\d_:\s][^_:\s]*)"),  # P_north_colour; P_north_1_colour could be either
)
_UNITS = {
    "p": "MPa",
    "q": "m3/s",
    "t": "degC",
    "pwr": "kW",
    "inv": "m3",
    "SNQ": "m3/s",
    "SP": "MPa",
    "SPD": "MPa",
    "FR": "-",
    "ST": "-",
}


def parse_column(name: str) -> tuple[str, str]:
    """(device, quantity) of a column name. Raises DataError for a name of neither layout.

    A device's name may hold underscores, since the known quantities end a column's name in one way only. A quantity
    that is not known must show where it begins: after a number, or as the only word after the device's.
    """
    match = next(filter(None, (layout.fullmatch(name) for layout in _COLUMN_LAYOUTS)), None)
    if match is None:
        raise DataError(
            f"column {name!r} is neither 'DEVICE_NUMBER:PARAMETER' (Boundary.csv, such as B_001:FR) nor "
            "'DEVICE_NUMBER_quantity' (an output file, such as B_001_p_in): rename it; where the device's own name "
            "has underscores, the quantity must be p, q, t, pwr or inv, with _in or _out or without"
        )
    return match[1], match[2]


def kind(device: str) -> str:
    """What a device is: the letter, or letters, before the first underscore of its name ("C_Waidhaus_1" -> "C")."""
    return device.partition("_")[0]


def unit(quantity: str) -> str:
    """Unit of a quantity ("p_in" -> "MPa"); "-" where dimensionless, "" where unknown."""
    return _UNITS.get(quantity, _UNITS.get(quantity.split("_")[0], ""))


@dataclass(frozen=True)
class Schema:
    """The columns of a network's files, in file order, TIME left out.

    boundary: columns of Boundary.csv, such as "B_001:FR"
    groups: columns of each output file, such as {"B": ("B_001_p_in", ...), ..., "T&E": (...)}; every group is a key,
        a network without such devices has an empty tuple there, and needs no such file

    A variable is a column. V variables are the boundary columns followed by the output columns (the state vector),
    group after group in the order of GROUPS.
    """

    boundary: tuple[str, ...]
    groups: dict[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        if tuple(self.groups) != GROUPS:
            raise DataError(f"a schema needs the groups {list(GROUPS)} in this order, not {list(self.groups)}")
        if not self.boundary or not self.states:
            raise DataError("a schema needs at least one boundary column and one output column")
        twice = [name for name, count in Counter(self.columns).items() if count > 1]
        if twice:
            raise DataError(f"column {twice[0]!r} occurs more than once in the network's files: rename one of them")
        for name in self.columns:
            parse_column(name)

    @cached_property
    def states(self) -> tuple[str, ...]:
        """All output columns, in the order of the state vector."""
        return tuple(name for group in GROUPS for name in self.groups[group])

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """All V names: boundary, then states."""
        return self.boundary + self.states

    @property
    def num_boundary(self) -> int:
        return len(self.boundary)

    @property
    def num_states(self) -> int:
        return len(self.states)

    @property
    def num_variables(self) -> int:
        return len(self.columns)

    @property
    def present_groups(self) -> tuple[str, ...]:
        """The groups that the network has, each with a file of its own."""
        return tuple(group for group in GROUPS if self.groups[group])

    @cached_property
    def group_slices(self) -> dict[str, slice]:
        """Where each group's columns stand in the state vector."""
        slices, start = {}, 0
        for group in GROUPS:
            slices[group] = slice(start, start + len(self.groups[group]))
            start += len(self.groups[group])
        return slices

    def to_json(self) -> dict[str, Any]:
        groups = {group: list(names) for group, names in self.groups.items()}
        return {"version": _VERSION, "boundary": list(self.boundary), "groups": groups}

    @classmethod
    def from_json(cls, value: Any) -> Schema:
        """Inverse of `to_json`. Raises DataError if `value` is not a schema."""
        if not isinstance(value, dict) or type(value.get("version")) is not int or value["version"] != _VERSION:
            raise DataError(f"not a schema of version {_VERSION}")
        boundary, groups = value.get("boundary"), value.get("groups")
        if not _is_names(boundary) or not isinstance(groups, dict) or not all(map(_is_names, groups.values())):
            raise DataError(
                "a schema needs 'boundary', a list of column names, and 'groups', a list of them for each file"
            )
        return cls(tuple(boundary), {group: tuple(names) for group, names in groups.items()})

    def write(self, folder: Path) -> None:
        """Write `folder`/schema.json."""
        (folder / "schema.json").write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Schema:
        """Read `folder`/schema.json. Raises DataError if it is absent or damaged."""
        path = folder / "schema.json"
        try:
            return cls.from_json(read_json(path, _MAX_BYTES))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read as a schema: {reason(error)}") from error
        except DataError as error:
            raise DataError(f"{path}: cannot be read as a schema: {error}") from error


class Device(NamedTuple):
    """A device's columns: `boundary` are places in the boundary vector, `states` in the state vector, ascending."""

    name: str
    kind: str
    boundary: tuple[int, ...]
    states: tuple[int, ...]


def devices(schema: Schema) -> tuple[Device, ...]:
    """The devices of a network, in the order in which the V columns name them first: boundary, then states."""
    places: dict[str, tuple[list[int], list[int]]] = {}
    for part, columns in enumerate((schema.boundary, schema.states)):
        for place, column in enumerate(columns):
            places.setdefault(parse_column(column)[0], ([], []))[part].append(place)
    return tuple(
        Device(name, kind(name), tuple(boundary), tuple(states)) for name, (boundary, states) in places.items()
    )


def _is_names(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
