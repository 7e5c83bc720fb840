"""Days of operation: what the set-points look like."""

from __future__ import annotations

import numpy as np
import pytest

from trunkline.models.fluid.simulator.scenario import BEFORE, ROWS, columns, random_day
from trunkline.models.fluid.simulator.simulate import NETWORKS


def test_reference_columns_are_the_538_of_the_reference_in_file_order() -> None:
    names = columns(NETWORKS["reference"]())
    assert len(names) == 538
    kinds = "".join(dict.fromkeys(name[0] for name in names))
    assert kinds == "TEBCR"
    parameters = [name.split(":")[1] for name in names]
    assert parameters[:7] == ["SP"] + ["SNQ"] * 6
    assert set(parameters[7:129]) == {"SNQ"}
    assert set(parameters[129:472]) == {"FR"}
    assert parameters[472:518] == ["ST", "SP_out"] * 23
    assert parameters[518:] == ["ST", "SPD"] * 10


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_every_day_switches_and_most_values_change_every_three_hours(name: str) -> None:
    network = NETWORKS[name]()
    names = columns(network)
    switching = np.array([column.endswith((":ST", ":FR")) for column in names])
    on_slot = anywhere = 0
    for seed in range(20):
        table = random_day(network, np.random.default_rng(seed)).table(network)
        assert table.shape == (ROWS, len(names))
        assert np.isin(table[:, switching], (0.0, 1.0)).all()
        changes = np.diff(table, axis=0) != 0
        assert changes[:, switching].any()
        on_slot += int(changes[:, ~switching][5::6].sum())
        anywhere += int(changes[:, ~switching].sum())
    assert on_slot > 0.6 * anywhere


def test_unit_valves_follow_their_compressor_and_by_passes_open_when_a_station_is_off() -> None:
    network = NETWORKS["reference"]()
    day = random_day(network, np.random.default_rng(2))
    unit = network.valve_unit >= 0
    np.testing.assert_array_equal(day.opening[:, unit], day.compressor_on[:, network.valve_unit[unit]])
    assert (day.opening[:, unit] == 0).any()
    for valve in np.flatnonzero(network.valve_by_pass >= 0):
        units = day.compressor_on[:, network.compressors.station == network.valve_by_pass[valve]]
        np.testing.assert_array_equal(day.opening[:, valve], units.max(axis=1) == 0)


def test_one_of_the_control_valves_of_a_city_is_always_on() -> None:
    network = NETWORKS["reference"]()
    station = network.regulators.station
    for seed in range(30):
        on = random_day(network, np.random.default_rng(seed)).regulator_on
        assert all(on[:, station == k].any(axis=1).all() for k in set(station.tolist()))
        assert len(on) == BEFORE + ROWS


def test_a_station_without_by_pass_keeps_a_compressor_on() -> None:
    network = NETWORKS["regional"]()
    station = network.compressors.station
    assert (network.valve_by_pass < 0).all()
    switched = 0
    for seed in range(30):
        on = random_day(network, np.random.default_rng(seed)).compressor_on
        assert all(on[:, station == k].any(axis=1).all() for k in set(station.tolist()))
        switched += int(np.abs(np.diff(on, axis=0)).sum())
    assert switched > 60


def test_source_and_demand_of_a_network_nearly_balance() -> None:
    for name in NETWORKS:
        network = NETWORKS[name]()
        assert network.source_flow.sum() == pytest.approx(network.delivery_flow.sum(), rel=0.05)
