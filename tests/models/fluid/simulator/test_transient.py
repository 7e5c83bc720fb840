"""Runs through time: mass, start of the day, cutting of steps, errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from trunkline.engine.errors import DataError
from trunkline.models.fluid.simulator.hydraulics import Hydraulics, NotConvergedError
from trunkline.models.fluid.simulator.scenario import BEFORE, Day, random_day
from trunkline.models.fluid.simulator.simulate import NETWORKS
from trunkline.models.fluid.simulator.topology import Network
from trunkline.models.fluid.simulator.transient import MINUTES, Record, Step, day_steps, run, run_day, settling


def _imbalance(network: Network, record: Record) -> float:
    """Linepack gained less net supply, over a whole record, as a share of what was delivered."""
    gas, pipes = network.gas, network.pipes

    def held(p: np.ndarray) -> float:
        ends = 0.5 * (gas.linepack(pipes.volume, p[pipes.start]) + gas.linepack(pipes.volume, p[pipes.end]))
        return float(ends.sum() + gas.linepack(network.station_volume, p).sum())

    gained = held(record.p[-1]) - held(record.initial)
    supplied = float((record.dt * record.source_flow.sum(axis=1)).sum())
    delivered = float((record.dt * record.delivery_flow.sum(axis=1)).sum())
    return abs(gained - (supplied - delivered)) / delivered


@pytest.fixture(scope="module")
def demo() -> tuple[Network, Day, Record]:
    network = NETWORKS["demo"]()
    day = random_day(network, np.random.default_rng(5))
    return network, day, run_day(network, day, "test")


def test_mass_is_conserved_over_a_day(demo: tuple[Network, Day, Record]) -> None:
    network, _, record = demo
    assert len(record.p) == 1440
    assert _imbalance(network, record) < 1e-8


def test_mass_is_conserved_in_the_reference_network() -> None:
    network = NETWORKS["reference"]()
    day = random_day(network, np.random.default_rng(6))
    steps = settling(0) + [Step(BEFORE + minute // 30, 60.0, minute) for minute in range(120)]
    assert _imbalance(network, run(network, day, steps, "test").tail(120)) < 1e-8


@pytest.mark.slow
def test_mass_is_conserved_over_a_day_of_the_reference_network() -> None:
    network = NETWORKS["reference"]()
    day = random_day(network, np.random.default_rng(6))
    assert _imbalance(network, run_day(network, day, "test")) < 1e-8


def test_days_start_from_different_but_settled_states() -> None:
    network = NETWORKS["demo"]()
    starts, first_moves = [], []
    for seed in range(4):
        day = random_day(network, np.random.default_rng(seed))
        record = run(network, day, day_steps()[: 20 - MINUTES], "test").tail(20)
        starts.append(record.initial)
        first_moves.append(np.abs(np.diff(record.p, axis=0)).max())
    assert np.ptp(np.array(starts), axis=0).max() > 0.1
    # The first half hour goes on under the set-points of the last one, so no artificial shock starts a day.
    assert max(first_moves) < 0.2


def test_steps_that_do_not_converge_are_cut_and_mass_still_balances(monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS["demo"]()
    day = random_day(network, np.random.default_rng(5))
    solve, lengths = Hydraulics.step, []

    def reluctant(self: Hydraulics, old: np.ndarray, dt: float, *rest: object) -> np.ndarray:
        if dt in (60.0, 30.0):
            raise NotConvergedError("too long")
        lengths.append(dt)
        return solve(self, old, dt, *rest)

    whole = run(network, day, [Step(0, 600.0, 0)] * 30 + [Step(BEFORE, 60.0, i) for i in range(90)], "test").tail(90)
    monkeypatch.setattr(Hydraulics, "step", reluctant)
    cut = run(network, day, [Step(0, 600.0, 0)] * 30 + [Step(BEFORE, 60.0, i) for i in range(90)], "test").tail(90)
    assert lengths.count(15.0) == 4 * 90
    assert _imbalance(network, cut) < 1e-8
    np.testing.assert_allclose(cut.p[-1], whole.p[-1], rtol=2e-3)


def test_a_day_beyond_the_network_is_an_error_with_case_minute_and_equation(demo: tuple[Network, Day, Record]) -> None:
    network, day, _ = demo
    demand = day.delivery_flow.copy()
    demand[BEFORE + 20 :] *= 8.0
    with pytest.raises(DataError, match=r"train/case_0009, minute 6\d\d: .* of [A-Z]_\d{3}, off by") as raised:
        run_day(network, replace(day, delivery_flow=demand), "train/case_0009")
    assert "another seed" in str(raised.value)
