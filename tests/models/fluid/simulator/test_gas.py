"""Gas laws against integration of the differential equations and textbook identities."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad, solve_ivp

from trunkline.models.fluid.simulator.gas import KELVIN, NORMAL_PRESSURE_MPA, Gas, darcy_friction


def test_linepack_is_mass_over_normal_density() -> None:
    gas = Gas()
    p, volume = 6.0, 1000.0
    density = p * 1e6 / (float(gas.compressibility(np.array(p))) * gas.specific_gas_constant * gas.flow_temperature_k)
    normal = NORMAL_PRESSURE_MPA * 1e6 / (gas.specific_gas_constant * KELVIN)
    assert float(gas.linepack(np.array(volume), np.array(p))) == pytest.approx(volume * density / normal, rel=1e-12)


@pytest.mark.parametrize("flow", [40.0, 120.0])
def test_pipe_resistance_follows_from_the_momentum_equation(flow: float) -> None:
    gas, length, diameter, friction, p_in = Gas(), 50e3, 0.7, 0.0102, 6.5
    area = math.pi / 4 * diameter**2
    mass = flow * gas.normal_density

    def gradient(_: float, p: np.ndarray) -> np.ndarray:
        density = p * 1e6 / (gas.compressibility(p) * gas.specific_gas_constant * gas.flow_temperature_k)
        speed = mass / (density * area)
        return -friction / diameter * density * speed**2 / 2 * 1e-6

    p_out = float(solve_ivp(gradient, (0.0, length), [p_in], rtol=1e-10, atol=1e-12).y[0, -1])
    k = float(gas.resistance(np.array(length), np.array(diameter), np.array(friction)))
    z = float(gas.compressibility(np.array((p_in + p_out) / 2)))
    assert k * z * flow**2 == pytest.approx(p_in**2 - p_out**2, rel=2e-3)


def test_compressor_power_is_the_work_along_an_isentrope() -> None:
    gas, flow, p_in, ratio, t_in = Gas(), 80.0, 5.0, 1.4, 12.0
    z = float(gas.compressibility(np.array(p_in)))
    volume = z * gas.specific_gas_constant * (t_in + KELVIN) / (p_in * 1e6)
    work, _ = quad(lambda p: volume * (p_in / p) ** (1 / gas.isentropic_exponent), p_in, p_in * ratio)
    expected = work * 1e6 * flow * gas.normal_density / gas.compressor_efficiency / 1e3
    one = np.array(1.0)
    power = gas.compressor_power(flow * one, p_in * one, ratio * one, t_in * one)
    assert float(power) == pytest.approx(expected, rel=1e-9)


def test_no_power_without_a_rise_in_pressure() -> None:
    power = Gas().compressor_power(np.array([90.0, -5.0]), np.array([5.0, 5.0]), np.array([0.95, 1.3]), np.zeros(2))
    assert power.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("diameter", [0.2, 1.2])
def test_friction_is_colebrook_at_infinite_reynolds_number(diameter: float) -> None:
    friction = float(darcy_friction(np.array(diameter), 3e-5))
    assert 1 / math.sqrt(friction) == pytest.approx(-2 * math.log10(3e-5 / (3.71 * diameter)), rel=1e-12)
