"""A random day of operation: demands, set flows, set pressures and switches, every 30 minutes.

Values hold for three hours as a rule and change at multiples of three hours; some changes come half an hour or an hour
later. Switches (compressors, control valves, ball valves) come at random slots, so a day has several of them.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from itertools import islice

import numpy as np

from trunkline.models.fluid.simulator.gas import Array
from trunkline.models.fluid.simulator.hydraulics import Controls
from trunkline.models.fluid.simulator.topology import Network, Stations

ROWS = 48
ROW_MINUTES = 30
SLOT_ROWS = 6  # three hours
BEFORE = 12  # rows before 0:00 that lead the network to its start


def columns(network: Network) -> list[str]:
    """Boundary columns `T_001:SP`, in file order: T, E, B, C, R."""
    names = [f"{name}:{'SP' if i == network.pressure_source else 'SNQ'}" for i, name in enumerate(network.names("T"))]
    names += [f"{name}:SNQ" for name in network.names("E")]
    names += [f"{name}:FR" for name in network.names("B")]
    names += [f"{name}:{parameter}" for name in network.names("C") for parameter in ("ST", "SP_out")]
    names += [f"{name}:{parameter}" for name in network.names("R") for parameter in ("ST", "SPD")]
    return names


@dataclass
class Day:
    """Set-points in force from each half hour on, the first BEFORE rows before midnight. Flows m3/s, pressures MPa."""

    source_flow: Array  # [rows, T], ignored at the pressure source
    source_pressure: Array  # [rows]
    delivery_flow: Array  # [rows, E]
    opening: Array  # [rows, B]
    compressor_on: Array  # [rows, C]
    compressor_set: Array
    regulator_on: Array  # [rows, R]
    regulator_set: Array

    def controls(self, network: Network, row: int) -> Controls:
        """The set-points of one row."""
        supply = np.zeros(network.num_nodes)
        flow = self.source_flow[row].copy()
        flow[network.pressure_source] = 0.0
        np.add.at(supply, network.source_node, flow)
        np.add.at(supply, network.delivery_node, -self.delivery_flow[row])
        return Controls(
            supply=supply,
            source_pressure=float(self.source_pressure[row]),
            opening=self.opening[row],
            compressor_on=self.compressor_on[row],
            compressor_set=self.compressor_set[row],
            regulator_on=self.regulator_on[row],
            regulator_set=self.regulator_set[row],
        )

    def table(self, network: Network) -> Array:
        """[48, Vb] in the order of `columns`."""
        sources = self.source_flow.copy()
        sources[:, network.pressure_source] = self.source_pressure
        pairs = [
            np.stack([on, value], axis=2).reshape(len(on), 2 * on.shape[1])
            for on, value in (
                (self.compressor_on, self.compressor_set),
                (self.regulator_on, self.regulator_set),
            )
        ]
        return np.concatenate([sources, self.delivery_flow, self.opening, *pairs], axis=1)[BEFORE:]


def random_day(network: Network, rng: np.random.Generator) -> Day:
    """A day's set-points. Numbers are rounded as they are written, so the files hold exactly what was simulated."""
    n_t, n_e = len(network.source_node), len(network.delivery_node)
    season = rng.uniform(0.88, 1.12)

    hours = (np.arange(BEFORE + ROWS) - BEFORE) / 2.0
    peak = rng.normal(8.0, 1.5, n_e) + 11.0 * (rng.random(n_e) < 0.4)
    swing = rng.uniform(0.05, 0.22, n_e)
    daily = 1.0 + swing * np.cos(2 * np.pi * (hours[:, None] - peak) / 24.0)
    noise = rng.normal(1.0, 0.1, (BEFORE + ROWS, n_e))
    level = rng.uniform(0.9, 1.1, n_e)
    demand = network.delivery_flow * season * level * np.clip(daily * noise, 0.55, 1.4)
    demand = _held(demand, _changes(rng, n_e, 0.9))

    supply = network.source_flow * season * rng.uniform(0.85, 1.1, (BEFORE + ROWS, n_t))
    supply = _held(supply, _changes(rng, n_t, 0.35))
    low, high = network.source_pressure
    pressure = _held(rng.uniform(low, high, (BEFORE + ROWS, 1)), _changes(rng, 1, 0.35))[:, 0]

    compressors, regulators = network.compressors, network.regulators
    compressor_on = _switched(rng, np.ones(len(compressors)), compressors.events, 4)
    opening = _switched(rng, network.valve_open, network.valve_events, 8)
    regulator_on = _switched(rng, np.ones(len(regulators)), regulators.events, 4)
    switches = (
        (compressor_on, compressors.events),
        (opening, network.valve_events),
        (regulator_on, regulators.events),
    )
    if not any(np.diff(switch[BEFORE:], axis=0).any() for switch, _ in switches):
        start = BEFORE + SLOT_ROWS * int(rng.integers(1, 7))
        able = ((switch, device) for switch, events in switches for device in np.flatnonzero(events))
        for switch, device in islice(able, 1):
            switch[start : start + 4, device] = 1.0 - switch[start, device]
    compressor_on = _one_on(compressors, compressor_on, by_passed=set(network.valve_by_pass.tolist()))
    return Day(
        source_flow=np.round(supply, 4),
        source_pressure=np.round(pressure, 4),
        delivery_flow=np.round(demand, 4),
        opening=_interlocked(network, opening, compressor_on),
        compressor_on=compressor_on,
        compressor_set=_set_pressures(rng, compressors),
        regulator_on=_one_on(regulators, regulator_on),
        regulator_set=_set_pressures(rng, regulators),
    )


def _set_pressures(rng: np.random.Generator, stations: Stations) -> Array:
    """[rows, K], the same for all devices of a station: around a level of the day, within the device's range."""
    count = stations.num_stations
    level = rng.random(count)
    share = np.clip(level + rng.uniform(-0.25, 0.25, (BEFORE + ROWS, count)), 0.0, 1.0)
    share = _held(share, _changes(rng, count, 0.4))[:, stations.station]
    low, high = stations.setpoint.T
    return np.round(low + (high - low) * share, 3)


def _interlocked(network: Network, opening: Array, compressor_on: Array) -> Array:
    """Unit valves follow their compressor; a station's by-pass opens when all its units are off."""
    opening = opening.copy()
    follows = network.valve_unit >= 0
    opening[:, follows] = compressor_on[:, network.valve_unit[follows]]
    for valve in np.flatnonzero(network.valve_by_pass >= 0):
        units = network.compressors.station == network.valve_by_pass[valve]
        opening[:, valve] = ~compressor_on[:, units].any(axis=1)
    return opening


def _one_on(devices: Stations, on: Array, by_passed: Set[int] = frozenset()) -> Array:
    """Of several devices in parallel one stays on, unless a by-pass feeds what lies behind them."""
    on = on.copy()
    for station in range(devices.num_stations):
        members = np.flatnonzero(devices.station == station)
        if len(members) > 1 and station not in by_passed:
            starved = ~on[:, members].any(axis=1)
            on[starved, members[0]] = 1.0
    return on


def _changes(rng: np.random.Generator, count: int, rate: float) -> Array:
    """[rows, count] True where a new value takes force: at slots of three hours, now and then up to an hour later."""
    rows = BEFORE + ROWS
    changes = np.zeros((rows, count), dtype=bool)
    changes[0] = True
    for slot in range(SLOT_ROWS, rows, SLOT_ROWS):
        late = np.where(rng.random(count) < 0.25, rng.integers(1, 3, count), 0)
        changes[slot + late, np.arange(count)] = rng.random(count) < rate
    return changes


def _held(values: Array, changes: Array) -> Array:
    """Each column keeps its value until the next change."""
    last = np.maximum.accumulate(np.where(changes, np.arange(len(values))[:, None], 0), axis=0)
    return np.take_along_axis(values, last, axis=0)


def _switched(rng: np.random.Generator, usual: Array, events: Array, longest: int) -> Array:
    """[rows, K] of 0 or 1: a device leaves its usual position about `events` times a day, for 1 to `longest` rows."""
    rows = BEFORE + ROWS
    starts = rng.random((rows, len(usual))) < events / ROWS
    lengths = rng.integers(1, longest + 1, starts.shape)
    away = np.zeros(starts.shape, dtype=bool)
    for row, device in np.argwhere(starts):
        away[row : row + lengths[row, device], device] = True
    return np.where(away, 1.0 - usual, usual)
