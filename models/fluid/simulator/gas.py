"""Gas laws of the network simulator: equation of state, friction and compressor power.

Flows are normal volume flows (0 degC, 101.325 kPa) in m3/s, pressures MPa absolute, lengths m, temperatures degC unless
a name says kelvin. Flow is isothermal: the equation of state and friction know one flow temperature.

Equation of state: Z(p) = 1 / (1 + beta p), a fit to natural gas near 285 K (Z = 0.89 at 5 MPa, 0.80 at 10 MPa), so that
density ~ p (1 + beta p) rises with p for every p > 0 and no root has to be chosen.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

NORMAL_PRESSURE_MPA = 0.101325
KELVIN = 273.15

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Gas:
    """Constants of the gas and of the ground around the pipes."""

    specific_gas_constant: float = 467.0  # J/(kg K)
    flow_temperature_k: float = 285.0
    compressibility_beta: float = 0.025  # 1/MPa
    heat_capacity: float = 2300.0  # J/(kg K)
    isentropic_exponent: float = 1.30
    compressor_efficiency: float = 0.80
    joule_thomson: float = 4.5  # K/MPa
    ground_temperature: float = 9.0  # degC
    heat_transfer: float = 1.6  # W/(m2 K), gas to ground, on the inner surface of a pipe

    @property
    def normal_density(self) -> float:
        """kg per normal m3."""
        return NORMAL_PRESSURE_MPA * 1e6 / (self.specific_gas_constant * KELVIN)

    @property
    def linepack_factor(self) -> float:
        """Normal m3 of ideal gas in one m3 at 1 MPa and flow temperature."""
        return KELVIN / (NORMAL_PRESSURE_MPA * self.flow_temperature_k)

    def compressibility(self, p: Array) -> Array:
        """Z at pressure p (MPa)."""
        return 1.0 / (1.0 + self.compressibility_beta * p)

    def linepack(self, volume: Array, p: Array) -> Array:
        """Normal m3 of gas in `volume` m3 at p MPa."""
        return volume * self.linepack_factor * p * (1.0 + self.compressibility_beta * p)

    def resistance(self, length: Array, diameter: Array, friction: Array) -> Array:
        """k of  p1^2 - p2^2 = k Z(p_mean) q |q|  in MPa2/(m3/s)2: the steady isothermal momentum equation.

        `friction` is the Darcy friction factor.
        """
        rt = self.specific_gas_constant * self.flow_temperature_k
        mass = self.normal_density**2
        return 16.0 * friction * rt * length * mass / (math.pi**2 * diameter**5) * 1e-12

    def isentropic_head(self, ratio: Array) -> Array:
        """ratio^((kappa-1)/kappa) - 1, zero for ratios below one."""
        exponent = (self.isentropic_exponent - 1.0) / self.isentropic_exponent
        return np.maximum(ratio, 1.0) ** exponent - 1.0

    def compressor_power(self, q: Array, p_in: Array, ratio: Array, t_in: Array) -> Array:
        """Shaft power in kW for q m3/s from p_in (MPa, t_in degC) over a pressure ratio."""
        kappa = self.isentropic_exponent
        head = kappa / (kappa - 1.0) * self.specific_gas_constant * (t_in + KELVIN) * self.isentropic_head(ratio)
        mass = np.maximum(q, 0.0) * self.normal_density
        return mass * head * self.compressibility(p_in) / self.compressor_efficiency / 1e3

    def ground_conductance(self, length: Array, diameter: Array) -> Array:
        """Heat lost to the ground by a pipe per kelvin, as the normal flow (m3/s) of gas that would carry it."""
        surface = math.pi * diameter * length
        return self.heat_transfer * surface / (self.normal_density * self.heat_capacity)

    def to_json(self) -> dict[str, float]:
        """The constants under the names used here, with the normal state they refer to."""
        return {**asdict(self), "normal_pressure_mpa": NORMAL_PRESSURE_MPA, "normal_temperature_k": KELVIN}


def darcy_friction(diameter: Array, roughness: float) -> Array:
    """Friction factor of fully rough turbulent flow (Nikuradse): (2 log10(3.71 D / roughness))^-2; both in m."""
    return (2.0 * np.log10(3.71 * diameter / roughness)) ** -2.0
