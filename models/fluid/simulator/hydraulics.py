"""One implicit time step of the gas network, by Newton's method.

Unknowns are the N node pressures p (MPa) and the K edge flows m (normal m3/s). Equations, with M_i(p) the linepack of
half of every pipe that ends in node i and of the node's own piping:

    node      (M_i(p_i) - M_i(old)) / dt = sum of flows in - sum of flows out + supply_i
    source    p_i = set pressure, in place of the balance of its node; its supply is what that balance then asks for
    P, H, B   f^2 (p1^2 - p2^2) = k Z(p_mean) m |m| + (1 - f^2) m      f the opening, 1 for P and H: shut is m = 0
    C, R      min(m, p2 - target(p1, m)) = 0: either the outlet holds its target or the check valve is shut above it
              compressor on   target = max(p1 - r m, min(set - d m, p1 (1 + (ratio - 1)(1 - (m/max)^2))))
              compressor off  target = p1 - r m  (open by-pass)
              valve on        target = min(set - d m, p1 - 1 MPa m/max)
              valve off       m = 0

min, max and |m| are smoothed by small constants and the droops r, d are positive, so every edge equation rises strictly
in m: the Jacobian stays regular also where compressors stand in parallel or valves shut off a part of the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.linalg import get_lapack_funcs
from scipy.sparse import csc_matrix, csr_matrix
from scipy.sparse.linalg import splu

from trunkline.models.fluid.simulator.gas import Array
from trunkline.models.fluid.simulator.stations import DROOP, FLOW_SCALE, OPEN_DROP, compressor, regulator
from trunkline.models.fluid.simulator.topology import Index, Network

DENSE_LIMIT = 100  # up to this number of unknowns LAPACK is faster than any sparse factorisation
FLOW_EPS = 0.05  # m3/s, |m| is sqrt(m^2 + FLOW_EPS^2)
SMOOTHING = 1e-4  # MPa, of min and max
SQUARE_SCALE = 0.1  # MPa per MPa2, the same for squares of pressures, exact at 5 MPa
TOLERANCE = 2e-9  # MPa, the largest scaled residual: 1e-7 m3/s in a node's balance

EQUATIONS = {
    "set_pressure_droop_mpa_s_per_m3": DROOP,
    "by_pass_drop_mpa_s_per_m3": OPEN_DROP,
    "flow_smoothing_m3_s": FLOW_EPS,
    "pressure_smoothing_mpa": SMOOTHING,
}
"""For network.json, which is to say all that the equations need."""


@dataclass(eq=False)
class Controls:
    """What the operator sets. Pressures in MPa, flows in m3/s."""

    supply: Array  # [N] set flows into the nodes, deliveries negative
    source_pressure: float
    opening: Array  # [B] 0 to 1
    compressor_on: Array  # [C] 0 or 1
    compressor_set: Array  # [C]
    regulator_on: Array  # [R] 0 or 1
    regulator_set: Array  # [R]


class NotConvergedError(Exception):
    """A step that Newton's method could not solve. The message names the worst equation and its residual."""


class Hydraulics:
    """The equations of one network. State: x [N + K] float64, the pressures and then the flows."""

    def __init__(self, network: Network) -> None:
        self.network = network
        gas = network.gas
        self.beta = gas.compressibility_beta
        self.num_nodes = n = network.num_nodes
        start, end = network.start, network.end
        k = len(start)
        self.size = n + k
        self.slack = int(network.source_node[network.pressure_source])
        lines = (network.pipes, network.shorts, network.valves)
        self.num_lines = sum(len(kind) for kind in lines)
        self.drag = SQUARE_SCALE * np.concatenate(
            [gas.resistance(kind.length, kind.diameter, kind.friction) for kind in lines]
        )
        volume = network.station_volume.copy()
        half = 0.5 * network.pipes.volume
        np.add.at(volume, network.pipes.start, half)
        np.add.at(volume, network.pipes.end, half)
        self.capacity = volume * gas.linepack_factor
        self._controls: Controls | None = None
        self._ends = np.stack([start, end])

        sign = np.concatenate([np.ones(k), -np.ones(k)]) * FLOW_SCALE
        rows, columns = np.concatenate([start, end]), np.tile(np.arange(k), 2)
        outflow = csr_matrix((sign, (rows, columns)), shape=(n, k))
        self._outflow = outflow.toarray() if self.size <= DENSE_LIMIT else outflow
        # Jacobian entries: node by its own p, node by flows (constant), edge by p1, by p2, by m.
        edge = n + np.arange(k)
        self._rows = np.concatenate([np.arange(n), rows, edge, edge, edge])
        self._columns = np.concatenate([np.arange(n), n + columns, start, end, edge])
        self._values = np.zeros(len(self._rows))
        self._values[n : n + 2 * k] = np.where(rows == self.slack, 0.0, sign)
        self._by_p1, self._by_p2, self._by_m = self._values[n + 2 * k :].reshape(3, k)
        self._solve = self._dense() if self.size <= DENSE_LIMIT else self._sparse()

    def linepack(self, x: Array) -> Array:
        """[N] normal m3 at every node."""
        p = x[: self.num_nodes]
        return self.capacity * p * (1.0 + self.beta * p)

    def slack_supply(self, old: Array, x: Array, dt: float, supply: Array) -> float:
        """What the pressure source delivers during a step, m3/s, from the balance of its node."""
        i = self.slack
        p, p_old = float(x[i]), float(old[i])
        stored = float(self.capacity[i]) * (p - p_old) * (1.0 + self.beta * (p + p_old)) / dt
        out = float((self._outflow @ x[self.num_nodes :])[i]) / FLOW_SCALE
        return stored + out - float(supply[i])

    def step(self, old: Array, dt: float, controls: Controls, guess: Array | None = None) -> Array:
        """The state dt seconds after `old`. Raises NotConvergedError when no strategy solves the equations."""
        self._set(controls)
        self._start_step(old, dt)
        failure: NotConvergedError | None = None
        plans: tuple[tuple[Array | None, tuple[float, ...]], ...]
        plans = ((guess, (SMOOTHING,)), (old, (SMOOTHING,)), (old, (0.3, 0.03, 3e-3, SMOOTHING)))
        for start, smoothings in plans:
            if start is None or start[: self.num_nodes].min() <= 0.0:
                continue
            try:
                x = start
                for smoothing in smoothings:
                    x = self._newton(x, smoothing)
                return x
            except NotConvergedError as error:
                failure = error
        assert failure is not None
        raise failure

    def _set(self, controls: Controls) -> None:
        """Prepares what depends on set-points alone."""
        if controls is self._controls:
            return
        self._controls = controls
        network = self.network
        self._fixed = controls.supply * FLOW_SCALE
        self._source_pressure = controls.source_pressure
        open_part = np.ones(self.num_lines)
        open_part[self.num_lines - len(network.valves) :] = controls.opening**2
        self._open = SQUARE_SCALE * open_part
        self._open_twice = 2.0 * self._open
        self._shut = FLOW_SCALE * (1.0 - open_part)
        c, r = network.compressors, network.regulators
        on = [value > 0.5 for value in controls.compressor_on]
        self._compressors = list(
            zip(on, controls.compressor_set.tolist(), (c.max_ratio - 1.0).tolist(), c.max_flow.tolist())
        )
        on = [value > 0.5 for value in controls.regulator_on]
        self._regulators = list(zip(on, controls.regulator_set.tolist(), (1.0 / r.max_flow).tolist()))

    def _start_step(self, old: Array, dt: float) -> None:
        """Prepares the node balances: linepack / dt = linear p + squared p^2, known = linepack(old) / dt + supply."""
        self._linear = (FLOW_SCALE / dt) * self.capacity
        self._squared = self._linear * self.beta
        self._known = (FLOW_SCALE / dt) * self.linepack(old) + self._fixed

    def _newton(self, x: Array, smoothing: float) -> Array:
        f = self._residual(x, smoothing)
        for _ in range(40):
            worst = float(np.abs(f).max())
            if worst < TOLERANCE:
                return x
            if not worst < math.inf:
                break
            direction = self._solve(f)
            # Pressures stay positive: no step takes more than half of one away.
            share = float((direction[: self.num_nodes] / x[: self.num_nodes]).max())
            fraction = 1.0 if share <= 0.5 else 0.5 / share
            merit = float(f @ f)
            for _ in range(10):
                trial = x - fraction * direction
                f_trial = self._residual(trial, smoothing)
                if float(f_trial @ f_trial) <= (1.0 - 1e-4 * fraction) * merit:
                    break
                fraction *= 0.5
            else:
                break
            x, f = trial, f_trial
        raise NotConvergedError(self._worst_equation(f))

    def _worst_equation(self, f: Array) -> str:
        i = int(np.argmax(np.where(np.isfinite(f), np.abs(f), np.inf)))
        if i < self.num_nodes:
            return f"balance of {self.network.names('N')[i]}, off by {f[i] / FLOW_SCALE:.3g} m3/s"
        return f"equation of {self.network.edge_names[i - self.num_nodes]}, off by {f[i]:.3g} MPa"

    def _residual(self, x: Array, smoothing: float) -> Array:
        """[N + K] residuals in MPa; leaves their derivatives in self._values."""
        n, lines = self.num_nodes, self.num_lines
        p, m = x[:n], x[n:]
        f = np.empty(self.size)

        expansion = self._squared * p
        f[:n] = (self._linear + expansion) * p + self._outflow @ m - self._known
        self._values[:n] = self._linear + 2.0 * expansion
        f[self.slack] = p[self.slack] - self._source_pressure
        self._values[self.slack] = 1.0

        ends = p[self._ends]
        p1, p2 = ends
        a, b = ends[:, :lines]
        q = m[:lines]
        half_beta = 0.5 * self.beta
        total = a + b
        rest = 1.0 + half_beta * total
        size = np.sqrt(q * q + FLOW_EPS * FLOW_EPS)
        drag = self.drag / rest
        drop = drag * q * size
        bend = drop * half_beta / rest
        f[n : n + lines] = drop - self._open * (total * (a - b)) + self._shut * q
        self._by_m[:lines] = drag * (size + q * q / size) + self._shut
        self._by_p1[:lines] = -self._open_twice * a - bend
        self._by_p2[:lines] = self._open_twice * b - bend

        stations = zip(p1[lines:].tolist(), p2[lines:].tolist(), m[lines:].tolist())
        rows = [
            compressor(*next(stations), on, setpoint, rise, max_flow, smoothing)
            for on, setpoint, rise, max_flow in self._compressors
        ]
        rows += [regulator(*next(stations), on, setpoint, loss, smoothing) for on, setpoint, loss in self._regulators]
        f[n + lines :], self._by_p1[lines:], self._by_p2[lines:], self._by_m[lines:] = np.reshape(rows, (-1, 4)).T
        return f

    def _dense(self) -> Callable[[Array], Array]:
        (solve,) = get_lapack_funcs(("gesv",), (np.empty((1, 1)),))
        matrix = np.zeros((self.size, self.size), order="F")
        flat = matrix.reshape(-1, order="F")
        where: Index = self._rows + self._columns * self.size

        def solution(f: Array) -> Array:
            flat[where] = self._values
            _, _, x, info = solve(matrix, f)
            if info != 0:
                raise NotConvergedError("singular Jacobian")
            return np.asarray(x)

        return solution

    def _sparse(self) -> Callable[[Array], Array]:
        shape = (self.size, self.size)
        order = csc_matrix((np.arange(len(self._rows)) + 1.0, (self._rows, self._columns)), shape=shape)
        where = order.data.astype(np.intp) - 1
        matrix = csc_matrix((np.zeros(len(where)), order.indices, order.indptr), shape=shape)

        def solution(f: Array) -> Array:
            np.take(self._values, where, out=matrix.data)
            try:
                return np.asarray(splu(matrix).solve(f))
            except RuntimeError as error:
                raise NotConvergedError("singular Jacobian") from error

        return solution
