"""Predictions that no gas network can show: counted and named, never clipped.

    Outside.of(predicted, schema, scale)   how many values of each column lie outside its bounds, and the worst of them
    a + b                                  of the predictions of both
    a.by_column(schema)                    {"C_001_pwr": {"values": 12, "worst": -300.0}}
    a.line(schema)                         the same in one line to read

Pressures are absolute, temperatures those of gas in pipes in the ground and behind compressors and valves. A flow may
have either sign. What is no number is outside of any bounds. A value that misses a bound by no more than SLACK of its
column's deviation lies on it: a compressor that is off has 0 kW, and a network says so to within rounding only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trunkline.models.fluid.schema import Schema, parse_column
from trunkline.models.fluid.words import shown_unit

BOUNDS: dict[str, tuple[float, float | None]] = {
    "p": (0.0, None), "t": (-50.0, 150.0), "pwr": (0.0, None), "inv": (0.0, None)
}  # fmt: skip
"""The least and, if any, the greatest possible value of a quantity: MPa, degC, kW, m3."""
SLACK = 1e-3
_NAMED = 3


@dataclass(frozen=True)
class Outside:
    """Of each column, [Vs]: how many values are outside, int64; by how much the worst is, 0 if none; its value."""

    values: Tensor
    excess: Tensor
    worst: Tensor

    @classmethod
    def of(cls, predicted: Tensor, schema: Schema, scale: Tensor) -> Outside:
        """predicted: [..., Vs], physical; scale [Vs]: the columns' deviations."""
        bounds = torch.tensor([_bounds(name) for name in schema.states], device=predicted.device).T
        flat = predicted.reshape(-1, schema.num_states)
        beyond = torch.maximum(bounds[0] - flat, flat - bounds[1]).masked_fill(~flat.isfinite(), math.inf)
        outside = beyond > SLACK * scale
        excess, row = beyond.masked_fill(~outside, 0).max(dim=0)
        return cls(outside.sum(0).cpu(), excess.cpu(), flat.gather(0, row[None])[0].cpu())

    def __add__(self, other: Outside) -> Outside:
        more = other.excess > self.excess
        excess, worst = (
            torch.where(more, theirs, mine) for mine, theirs in ((self.excess, other.excess), (self.worst, other.worst))
        )
        return Outside(self.values + other.values, excess, worst)

    def by_column(self, schema: Schema) -> dict[str, dict[str, float | None]]:
        """How many "values" are outside, and the "worst" of them (None: no number), of the columns that have any; most
        values first."""
        order = torch.argsort(self.values, descending=True, stable=True).tolist()
        worst = [value if math.isfinite(value) else None for value in self.worst.tolist()]
        return {
            schema.states[column]: {"values": int(self.values[column]), "worst": worst[column]}
            for column in order
            if self.values[column]
        }

    def line(self, schema: Schema) -> str:
        """ "30 values outside physical bounds: C_001_pwr 12 (worst -300 kW, bound 0), ..."; empty if there are none."""
        found = self.by_column(schema)
        if not found:
            return ""
        named = [f"{column} {of['values']:,} ({_worst(column, of['worst'])})" for column, of in found.items()]
        more = f", and {len(named) - _NAMED} further columns" if len(named) > _NAMED else ""
        return f"{int(self.values.sum()):,} values outside physical bounds: {', '.join(named[:_NAMED])}{more}"


def _worst(column: str, value: float | None) -> str:
    if value is None:
        return "worst no number"
    low, high = _bounds(column)
    return f"worst {value:.4g} {shown_unit(column)}, bound {high if value > high else low:g}"


def _bounds(column: str) -> tuple[float, float]:
    low, high = BOUNDS.get(parse_column(column)[1].split("_")[0], (-math.inf, None))
    return low, math.inf if high is None else high
