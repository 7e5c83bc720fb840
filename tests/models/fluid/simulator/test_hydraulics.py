"""One implicit step: derivatives, control modes, and steps that cannot be solved."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from trunkline.models.fluid.simulator.hydraulics import Controls, Hydraulics, NotConvergedError
from trunkline.models.fluid.simulator.simulate import NETWORKS
from trunkline.models.fluid.simulator.topology import Network


def _controls(network: Network) -> Controls:
    supply = np.zeros(network.num_nodes)
    flow = network.source_flow.copy()
    flow[network.pressure_source] = 0.0
    np.add.at(supply, network.source_node, flow)
    np.add.at(supply, network.delivery_node, -network.delivery_flow)
    return Controls(
        supply=supply,
        source_pressure=float(network.source_pressure.mean()),
        opening=network.valve_open.copy(),
        compressor_on=np.ones(len(network.compressors)),
        compressor_set=network.compressors.setpoint.mean(axis=1),
        regulator_on=np.ones(len(network.regulators)),
        regulator_set=network.regulators.setpoint.mean(axis=1),
    )


def _rest(network: Network) -> np.ndarray:
    return np.concatenate([np.full(network.num_nodes, 5.6), np.zeros(len(network.start))])


@pytest.fixture(scope="module")
def network() -> Network:
    return NETWORKS["demo"]()


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"compressor_on": np.zeros(1)},
        {"regulator_on": np.zeros(1)},
        {"opening": np.zeros(1)},
        {"opening": np.array([0.4])},
    ],
)
def test_jacobian_is_the_derivative_of_the_residual(network: Network, change: dict[str, np.ndarray]) -> None:
    hydraulics = Hydraulics(network)
    hydraulics._set(replace(_controls(network), **change))
    rng = np.random.default_rng(0)
    x = _rest(network) + rng.normal(size=hydraulics.size)
    hydraulics._start_step(_rest(network), 60.0)
    hydraulics._residual(x, 0.3)
    jacobian = np.zeros((hydraulics.size, hydraulics.size))
    np.add.at(jacobian, (hydraulics._rows, hydraulics._columns), hydraulics._values)
    for i in range(hydraulics.size):
        step = np.zeros(hydraulics.size)
        step[i] = 1e-6
        ahead, behind = (hydraulics._residual(x + s, 0.3) for s in (step, -step))
        np.testing.assert_allclose(jacobian[:, i], (ahead - behind) / 2e-6, atol=2e-7)


def test_sparse_and_dense_factorisations_give_the_same_step(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    controls, rest = _controls(network), _rest(network)
    dense = Hydraulics(network).step(rest, 60.0, controls)
    monkeypatch.setattr("trunkline.models.fluid.simulator.hydraulics.DENSE_LIMIT", 0)
    np.testing.assert_allclose(Hydraulics(network).step(rest, 60.0, controls), dense, atol=1e-6)


def test_shut_devices_carry_nothing_and_set_pressures_are_held(network: Network) -> None:
    hydraulics, slices = Hydraulics(network), network.edge_slices
    controls = replace(_controls(network), opening=np.zeros(1), regulator_on=np.zeros(1))
    x = hydraulics.step(_rest(network), 1e9, controls)
    p, m = x[: network.num_nodes], x[network.num_nodes :]
    assert abs(m[slices["B"]][0]) < 1e-6
    assert abs(m[slices["R"]][0]) < 1e-6
    assert p[network.compressors.end[0]] == pytest.approx(float(controls.compressor_set[0]), rel=1e-3)


def test_flow_never_runs_back_through_a_compressor_or_a_control_valve(network: Network) -> None:
    hydraulics, slices = Hydraulics(network), network.edge_slices
    x = hydraulics.step(_rest(network), 1e9, _controls(network))
    # The outlet is now above both set pressure and inlet: the check valves hold it.
    low = replace(_controls(network), compressor_on=np.zeros(1), regulator_set=np.array([3.0]), source_pressure=4.0)
    x = hydraulics.step(x, 60.0, low)
    assert x[network.num_nodes :][slices["C"]][0] > -1e-3
    assert x[network.num_nodes :][slices["R"]][0] > -1e-3
    assert x[network.compressors.end[0]] > 5.5


def test_a_step_without_solution_names_the_worst_equation(network: Network) -> None:
    hydraulics = Hydraulics(network)
    controls = _controls(network)
    controls.supply = controls.supply - 5000.0 * (np.arange(network.num_nodes) == network.delivery_node[0])
    with pytest.raises(NotConvergedError, match=r"(balance|equation) of [NPHBCR]_\d{3}, off by"):
        hydraulics.step(_rest(network), 60.0, controls)
