"""Runs of the network through time: hydraulics under set-points, then temperatures.

run_day   a day as a case holds it, from a settled start
run       any sequence of steps
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trunkline.engine.errors import DataError
from trunkline.models.fluid.simulator.gas import Array
from trunkline.models.fluid.simulator.hydraulics import Controls, Hydraulics, NotConvergedError
from trunkline.models.fluid.simulator.scenario import BEFORE, ROW_MINUTES, ROWS, Day
from trunkline.models.fluid.simulator.thermal import temperatures
from trunkline.models.fluid.simulator.topology import Network

MINUTES = 1440
CUTS = 64  # a step that does not converge is halved until it is cut into this number of parts


class Step(NamedTuple):
    """One step of a run: a row of set-points, a length, and the minute it ends at (0 is midnight)."""

    row: int
    length_s: float
    minute: int


@dataclass
class Record:
    """What a simulated run leaves, row i at the end of step i. MPa, m3/s, degC.

    Flows are means over the step. `initial` holds the pressures before the first step.
    """

    initial: Array  # [N]
    p: Array  # [S, N]
    m: Array  # [S, K] through the middle of each edge
    source_flow: Array  # [S, T]
    delivery_flow: Array  # [S, E]
    compressor_on: Array  # [S, C]
    dt: Array  # [S] s
    t: Array  # [S, N]
    t_edge: Array  # [S, K] of the gas that leaves each edge

    def tail(self, steps: int) -> Record:
        """The last steps alone."""
        rows = slice(len(self.p) - steps, None)
        initial = self.p[-steps - 1] if steps < len(self.p) else self.initial
        names = ("p", "m", "source_flow", "delivery_flow", "compressor_on", "dt", "t", "t_edge")
        return Record(initial, *(getattr(self, name)[rows] for name in names))


def run_day(network: Network, day: Day, case: str) -> Record:
    """The 1,440 minutes of a day. `case` names it in errors."""
    return run(network, day, day_steps(), case).tail(MINUTES)


def day_steps() -> list[Step]:
    """The steady state of a day's first row, the rows that lead from there to midnight, and the day's minutes."""
    steps = settling(0)
    for minute in range(5 - BEFORE * ROW_MINUTES, 5, 5):
        steps.append(Step(BEFORE + (minute - 5) // ROW_MINUTES, 300.0, minute))
    for minute in range(1, MINUTES + 1):
        steps.append(Step(BEFORE + min(minute // ROW_MINUTES, ROWS - 1), 60.0, minute))
    return steps


def settling(row: int) -> list[Step]:
    """Steps that lead to the steady state of a row of set-points: they grow until nothing moves."""
    return [Step(row, 60.0 * 10.0**power, -BEFORE * ROW_MINUTES) for power in range(8)]


def run(network: Network, day: Day, steps: Sequence[Step], case: str) -> Record:
    """Simulates `steps` under the set-points of `day`, from a network at rest.

    Raises DataError when the equations of a step cannot be solved.
    """
    n = network.num_nodes
    hydraulics = Hydraulics(network)
    state = np.concatenate([np.full(n, network.source_pressure.mean()), np.zeros(len(network.start))])
    initial = state[:n].copy()
    states, flows = np.empty((len(steps), n)), np.empty((len(steps), len(network.start)))
    rows = np.array([step.row for step in steps])
    dt = np.array([step.length_s for step in steps])
    source_flow = day.source_flow[rows]
    controls = {row: day.controls(network, row) for row in set(rows.tolist())}
    trend = np.zeros_like(state)
    for i, (row, length, minute) in enumerate(steps):
        guess = state + trend if i and steps[i - 1].length_s == length else None
        smallest = length / CUTS
        try:
            new, mean, supplied = _advance(hydraulics, state, length, controls[row], guess, smallest)
        except NotConvergedError as error:
            raise DataError(
                f"{case}, minute {minute}: the equations of the network have no solution, by steps of {smallest:.3g} s "
                f"either; worst: {error}. The day asks for more than the network can carry: try another seed"
            ) from error
        trend, state = new - state, new
        states[i], flows[i] = new[:n], mean
        source_flow[i, network.pressure_source] = supplied
    t, t_edge = temperatures(network, states, flows, source_flow, dt)
    return Record(initial, states, flows, source_flow, day.delivery_flow[rows], day.compressor_on[rows], dt, t, t_edge)


def _advance(
    hydraulics: Hydraulics, old: Array, dt: float, controls: Controls, guess: Array | None, smallest: float
) -> tuple[Array, Array, float]:
    """One step, by halves where it does not converge: the new state, mean flows [K], the pressure source's supply."""
    try:
        new = hydraulics.step(old, dt, controls, guess)
    except NotConvergedError:
        if dt / 2 < smallest:
            raise
        middle, m1, s1 = _advance(hydraulics, old, dt / 2, controls, None, smallest)
        new, m2, s2 = _advance(hydraulics, middle, dt / 2, controls, None, smallest)
        return new, 0.5 * (m1 + m2), 0.5 * (s1 + s2)
    return new, new[hydraulics.num_nodes :], hydraulics.slack_supply(old, new, dt, controls.supply)
