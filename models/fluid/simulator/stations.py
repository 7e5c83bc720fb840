"""The equations of compressors and regulators, one edge each; trunkline.models.fluid.simulator.hydraulics states them.

    compressor(p1, p2, m, ...), regulator(p1, p2, m, ...)   its residual in MPa, and the derivatives by p1, p2 and m

Stations are few and their equations branch: plain floats are faster here than arrays. Pressures are in MPa, flows in
m3/s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

DROOP = 2e-5  # MPa per m3/s, of the set pressures
OPEN_DROP = 1e-4  # MPa per m3/s, of a compressor's by-pass
FLOW_SCALE = 0.02  # MPa per m3/s, makes a flow and a pressure comparable in the complementarity and in norms

Row = Sequence[float]


def compressor(
    p1: float, p2: float, m: float, on: bool, setpoint: float, rise: float, max_flow: float, smoothing: float
) -> Row:
    """Its by-pass is open where it is not on."""
    target, by_p1, by_m = p1 - OPEN_DROP * m, 1.0, -OPEN_DROP
    if on:
        load = m / max_flow
        curve = 1.0 + rise * (1.0 - load * load)
        low, share = _smooth_min(setpoint - DROOP * m, p1 * curve, smoothing)
        low_by_p1 = (1.0 - share) * curve
        low_by_m = -share * DROOP - (1.0 - share) * p1 * rise * 2.0 * load / max_flow
        negative, share = _smooth_min(-target, -low, smoothing)
        target = -negative
        by_p1 = share + (1.0 - share) * low_by_p1
        by_m = share * by_m + (1.0 - share) * low_by_m
    return _check_valve(p2, m, target, by_p1, by_m, smoothing)


def regulator(p1: float, p2: float, m: float, on: bool, setpoint: float, loss: float, smoothing: float) -> Row:
    """It is shut where it is not on."""
    if not on:
        return FLOW_SCALE * m, 0.0, 0.0, FLOW_SCALE
    target, share = _smooth_min(setpoint - DROOP * m, p1 - loss * m, smoothing)
    return _check_valve(p2, m, target, 1.0 - share, -share * DROOP - (1.0 - share) * loss, smoothing)


def _check_valve(p2: float, m: float, target: float, by_p1: float, by_m: float, smoothing: float) -> Row:
    """min(scale m, p2 - target), given the target's derivatives."""
    value, share = _smooth_min(FLOW_SCALE * m, p2 - target, smoothing)
    return value, -(1.0 - share) * by_p1, 1.0 - share, share * FLOW_SCALE - (1.0 - share) * by_m


def _smooth_min(a: float, b: float, smoothing: float) -> tuple[float, float]:
    """min(a, b) rounded off within `smoothing`, and its derivative by a (that by b is the rest to 1)."""
    gap = a - b
    root = math.sqrt(gap * gap + smoothing * smoothing)
    return 0.5 * (a + b - root), 0.5 * (1.0 - gap / root)
