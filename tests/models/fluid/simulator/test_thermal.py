"""Temperatures under constant flow against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from trunkline.models.fluid.simulator.gas import KELVIN
from trunkline.models.fluid.simulator.simulate import NETWORKS
from trunkline.models.fluid.simulator.thermal import temperatures
from trunkline.models.fluid.simulator.topology import Network


@pytest.fixture(scope="module")
def network() -> Network:
    return NETWORKS["demo"]()


def _hold(network: Network, p: np.ndarray, m: np.ndarray, source: np.ndarray, steps: int, dt: float) -> np.ndarray:
    """Node temperatures [steps, N] under constant conditions."""
    rows = [np.tile(value, (steps, 1)) for value in (p, m, source)]
    return temperatures(network, *rows, np.full(steps, dt))[0]


def test_steady_chain_of_compressor_pipe_and_valve(network: Network) -> None:
    gas = network.gas
    p = np.array([5.5, 6.5, 6.5, 6.3, 5.0, 6.1, 5.0])
    m = np.zeros(8)
    slices = network.edge_slices
    m[slices["P"]] = [60.0, 0.0, 0.0, 60.0]  # N1 C N2 P1 N4 R N5 P4 N7
    m[slices["C"]] = m[slices["R"]] = 60.0
    nodes = _hold(network, p, m, np.array([60.0, 0.0]), 400, 3e4)[-1]

    source = network.source_temperature[0]
    exponent = (gas.isentropic_exponent - 1) / gas.isentropic_exponent
    hot = (source + KELVIN) * (1 + ((6.5 / 5.5) ** exponent - 1) / gas.compressor_efficiency) - KELVIN
    loss = gas.ground_conductance(network.pipes.length, network.pipes.diameter)

    def pipe(t: float, k: int, drop: float) -> float:
        return float((60.0 * (t - gas.joule_thomson * drop) + loss[k] * gas.ground_temperature) / (60.0 + loss[k]))

    arrived = pipe(hot, 0, 0.2)
    throttled = arrived - gas.joule_thomson * 1.3
    np.testing.assert_allclose(
        nodes[[0, 1, 3, 4, 6]], [source, hot, arrived, throttled, pipe(throttled, 3, 0.0)], rtol=1e-6
    )


def test_warm_front_travels_no_faster_than_the_gas(network: Network) -> None:
    p = np.full(7, 6.0)
    m = np.zeros(8)
    m[network.edge_slices["P"]] = [60.0, 0.0, 0.0, 0.0]
    m[network.edge_slices["C"]] = 60.0
    nodes = _hold(network, p, m, np.array([60.0, 0.0]), 600, 60.0)
    residence_s = float(network.gas.linepack(network.pipes.volume[0], np.array(6.0))) / 60.0
    rise = (nodes[:, 3] - nodes[0, 3]) / (nodes[:, 1] - nodes[0, 3])
    early = int(0.1 * residence_s / 60)
    assert rise[early] < 0.12
    assert np.all(np.diff(nodes[:, 3]) >= -1e-12)


def test_without_flow_nothing_leaves_ground_temperature(network: Network) -> None:
    nodes = _hold(network, np.full(7, 5.0), np.zeros(8), np.zeros(2), 50, 600.0)
    np.testing.assert_allclose(nodes, network.gas.ground_temperature, atol=1e-9)


def test_sparse_and_dense_solutions_agree(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    p, m = rng.uniform(4, 7, 7), rng.normal(0, 40, 8)
    dense = _hold(network, p, m, np.array([70.0, 20.0]), 5, 600.0)
    monkeypatch.setattr("trunkline.models.fluid.simulator.thermal.DENSE_LIMIT", 0)
    np.testing.assert_allclose(_hold(network, p, m, np.array([70.0, 20.0]), 5, 600.0), dense, rtol=1e-10)
