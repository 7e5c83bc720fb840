"""The regional network: its size, days within what such a network carries, and switches that move it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from trunkline.models.fluid.simulator.gas import KELVIN, NORMAL_PRESSURE_MPA
from trunkline.models.fluid.simulator.regional_network import regional
from trunkline.models.fluid.simulator.scenario import BEFORE, Day, columns, random_day
from trunkline.models.fluid.simulator.simulate import outputs
from trunkline.models.fluid.simulator.topology import Network
from trunkline.models.fluid.simulator.transient import Record, Step, run, run_day, settling


@pytest.fixture(scope="module")
def network() -> Network:
    return regional()


def test_counts_of_devices_and_variables(network: Network) -> None:
    counts = {kind: len(network.names(kind)) for kind in "TENPHBCR"}
    assert counts == {"T": 3, "E": 16, "N": 74, "P": 34, "H": 7, "B": 31, "C": 6, "R": 4}
    record = run(network, random_day(network, np.random.default_rng(0)), [Step(0, 60.0, 0)] * 2, "test")
    assert len(columns(network)) + sum(map(len, outputs(network, record).values())) == 877


def _velocity(network: Network, record: Record) -> np.ndarray:
    """[S, lines] m/s in pipes, short segments and ball valves, at the lower of their two pressures."""
    kinds = (network.pipes, network.shorts, network.valves)
    area = np.pi / 4 * np.concatenate([kind.diameter for kind in kinds]) ** 2
    lines = slice(0, len(area))
    p = np.minimum(record.p[:, network.start], record.p[:, network.end])[:, lines]
    gas = network.gas
    volume = NORMAL_PRESSURE_MPA / p * gas.flow_temperature_k / KELVIN * gas.compressibility(p)
    return np.asarray(np.abs(record.m[:, lines]) * volume / area)


def _check_day(network: Network, seed: int) -> np.ndarray:
    """Simulates a day and checks its pressures, velocities and ratios; returns how often each kind switches."""
    day = random_day(network, np.random.default_rng(seed))
    record = run_day(network, day, f"seed {seed}")
    assert record.p.min() > 3.5
    assert record.p.max() < 8.0
    velocity = _velocity(network, record)
    assert velocity[:, : len(network.pipes)].max() < 15.0
    assert (velocity > 15.0).any(axis=1).sum() <= 5, "a line that fills after its valve opens, for some minutes"
    at = network.edge_slices["C"]
    ratio = record.p[:, network.end[at]] / record.p[:, network.start[at]]
    assert ratio[record.compressor_on > 0].max() < 1.8
    assert record.source_flow.min() > -1.0
    switches = (day.compressor_on, day.regulator_on, day.opening[:, network.valve_events > 0])
    return np.array([np.abs(np.diff(switch[BEFORE:], axis=0)).sum() for switch in switches])


def test_a_day_is_within_what_the_network_carries(network: Network) -> None:
    _check_day(network, 0)


@pytest.mark.slow
def test_sixty_days_have_solutions_and_every_kind_switches_some_times_a_day(network: Network) -> None:
    switches = np.mean([_check_day(network, seed) for seed in range(60)], axis=0)
    assert (switches > 2).all()


def test_every_switch_moves_flows_and_pressures_of_other_devices(network: Network) -> None:
    """On one of two days: a compressor's loss is felt when the others cannot carry its share."""
    devices = [("compressor_on", "C", j) for j in range(len(network.compressors))]
    devices += [("regulator_on", "R", j) for j in range(len(network.regulators))]
    devices += [("opening", "B", int(j)) for j in np.flatnonzero(network.valve_events)]
    flow, pressure = np.zeros(len(devices)), np.zeros(len(devices))
    for seed in (3, 4):
        day = _held(random_day(network, np.random.default_rng(seed)), row=20)
        base = _later(network, day)
        for i, (field, kind, j) in enumerate(devices):
            moved = _later(network, _switched_off(network, day, field, j))
            own = network.edge_slices[kind].start + j
            assert abs(moved.m[-1, own]) < 0.01
            others = np.delete(moved.m[-1] - base.m[-1], own)
            flow[i] = max(flow[i], np.abs(others).max())
            pressure[i] = max(pressure[i], np.abs(moved.p[-1] - base.p[-1]).max())
    assert flow.min() > 1.0
    assert pressure.min() > 0.01


def _held(day: Day, row: int) -> Day:
    """Everything on and open, under the set-points of one row."""
    values = {name: np.tile(value[row], (len(value), *[1] * (value.ndim - 1))) for name, value in vars(day).items()}
    on = {name: np.ones_like(values[name]) for name in ("compressor_on", "regulator_on", "opening")}
    return Day(**{**values, **on})


def _switched_off(network: Network, day: Day, field: str, device: int) -> Day:
    """Off from row 1 on, with the valves that follow."""
    fields = {name: getattr(day, name).copy() for name in (field, "opening")}
    fields[field][1:, device] = 0.0
    if field == "compressor_on":
        fields["opening"][1:, network.valve_unit == device] = 0.0
    return replace(day, **fields)


def _later(network: Network, day: Day) -> Record:
    return run(network, day, settling(0) + [Step(1, 60.0, minute) for minute in range(30)], "test")
