"""One implicit time step of the gas network: pressures and flows at the end of the step, by Newton's method.

Unknowns are the N node pressures p (MPa) and the K edge flows m (normal m3/s). Equations, with M_i(p) the linepack of
half of every pipe that ends in node i and of the node's own piping:

    node      (M_i(p_i) - M_i(old)) / dt = sum of flows in - sum of flows out + supply_i
    source    p_i = set pressure, in place of the balance of its node; its supply is what that balance then asks for
    P, H, B   f^2 (p1^2 - p2^2) = k Z(p_mean) m |m| + (1 - f^2) m        f the opening, 1 for P and H: shut is m = 0
    C, R      min(m, p2 - target(p1, m)) = 0: either the outlet holds its target or the check valve is shut above it
              compressor on   target = max(p1 - r m, min(set - d m, p1 curve(m))), curve = 1 + (ratio - 1)(1 - (m/max)^2)
              compressor off  target = p1 - r m  (open by-pass)
              valve on        target = min(set - d m, p1 - r m)
              valve off       m = 0

min, max and |m| are smoothed by small constants and the droops r, d are positive, so every edge equation rises strictly
in m and falls in p1: the step has one solution also where compressors stand in parallel or a valve shuts a loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import get_lapack_funcs
from scipy.sparse import csc_matrix, csr_matrix
from scipy.sparse.linalg import splu

from models.fluid.gas import Array
from models.fluid.topology import Index, Network

DENSE_LIMIT = 100  # up to so many unknowns LAPACK is faster than any sparse factorisation
FLOW_EPS = 0.05  # m3/s, |m| is sqrt(m^2 + FLOW_EPS^2)
SMOOTHING = 1e-4  # MPa, of min and max
DROOP = 2e-5  # MPa per m3/s, of the set pressures
OPEN_DROP = 1e-4  # MPa per m3/s, of a by-pass or a wide open control valve
FLOW_SCALE = 0.02  # MPa per m3/s, makes a flow and a pressure comparable in the complementarity and in norms
TOLERANCE = 2e-9  # MPa, the largest scaled residual: 1e-7 m3/s in a node's balance


@dataclass
class Controls:
    """What the operator sets. Pressures in MPa, flows in m3/s."""

    supply: Array  # [N] set flows into the nodes, deliveries negative
    source_pressure: float
    opening: Array  # [B] 0 to 1
    compressor_on: Array  # [C] 0 or 1
    compressor_set: Array  # [C]
    regulator_on: Array  # [R] 0 or 1
    regulator_set: Array  # [R]


class NotConverged(Exception):
    """A step that Newton's method could not solve; `worst` names the worst equation and its residual."""

    def __init__(self, worst: str) -> None:
        super().__init__(worst)
        self.worst = worst


class Hydraulics:
    """The equations of one network. State: x [N + K] float64, the pressures and then the flows."""

    def __init__(self, network: Network) -> None:
        self.network = network
        gas = network.gas
        self.beta = gas.compressibility_beta
        self.num_nodes = n = network.num_nodes
        self.start, self.end = network.start, network.end
        k = len(self.start)
        self.size = n + k
        self.slack = int(network.source_node[network.pressure_source])
        self.slices = network.edge_slices
        lines = (network.pipes, network.shorts, network.valves)
        self.num_lines = sum(len(kind) for kind in lines)
        self.resistance = np.concatenate([gas.resistance(kind.length, kind.diameter, kind.friction) for kind in lines])
        self.volume = network.station_volume.copy()
        half = 0.5 * network.pipes.volume
        np.add.at(self.volume, network.pipes.start, half)
        np.add.at(self.volume, network.pipes.end, half)
        self.capacity = self.volume * gas.linepack_factor
        # Node balances are divided by the flow scale and edges are written in MPa, so one tolerance serves all rows.
        sign = np.concatenate([np.ones(k), -np.ones(k)]) * FLOW_SCALE
        rows = np.concatenate([self.start, self.end])
        columns = np.tile(np.arange(k), 2)
        self._outflow = csr_matrix((sign, (rows, columns)), shape=(n, k))
        if n + k <= DENSE_LIMIT:
            self._outflow = self._outflow.toarray()
        incidence = np.where(rows == self.slack, 0.0, sign)
        edge = n + np.arange(k)
        self._rows = np.concatenate([np.arange(n), rows, edge, edge, edge])
        self._columns = np.concatenate([np.arange(n), n + columns, self.start, self.end, edge])
        self._values = np.zeros(len(self._rows))
        self._values[n : n + 2 * k] = incidence
        self._factorise = self._dense() if self.size <= DENSE_LIMIT else self._sparse()

    def linepack(self, x: Array) -> Array:
        """[N] normal m3 at every node."""
        p = x[: self.num_nodes]
        return self.capacity * p * (1.0 + self.beta * p)

    def slack_supply(self, old: Array, x: Array, dt: float, supply: Array) -> float:
        """What the pressure source delivers during a step, from the balance of its node."""
        stored = (self.linepack(x) - self.linepack(old))[self.slack] / dt
        out = (self._outflow @ x[self.num_nodes :])[self.slack] / FLOW_SCALE
        return float(stored + out - supply[self.slack])

    def step(self, old: Array, dt: float, controls: Controls, guess: Array | None = None) -> Array:
        """The state dt seconds after `old`. Raises NotConverged when no strategy solves the equations."""
        mass = self.linepack(old)
        failure: NotConverged | None = None
        for start, smoothings in ((guess, (SMOOTHING,)), (old, (SMOOTHING,)), (old, (0.3, 0.03, 3e-3, SMOOTHING))):
            if start is None:
                continue
            try:
                x = start
                for smoothing in smoothings:
                    x = self._newton(x, mass, dt, controls, smoothing)
                return x
            except NotConverged as error:
                failure = error
        assert failure is not None
        raise failure

    def _newton(self, x: Array, mass: Array, dt: float, controls: Controls, smoothing: float) -> Array:
        f = self._residual(x, mass, dt, controls, smoothing)
        worst = float(np.abs(f).max())
        for _ in range(40):
            if worst < TOLERANCE:
                return x
            direction = self._factorise(f)
            p, change = x[: self.num_nodes], direction[: self.num_nodes]
            # Pressures stay positive: no step takes more than half of one away.
            fraction = min(1.0, 0.5 / max(float((change / p).max()), 1e-30))
            merit = float(f @ f)
            for _ in range(10):
                trial = x - fraction * direction
                f_trial = self._residual(trial, mass, dt, controls, smoothing)
                merit_trial = float(f_trial @ f_trial)
                if merit_trial <= (1.0 - 1e-4 * fraction) * merit or merit_trial < TOLERANCE**2:
                    break
                fraction *= 0.5
            else:
                break
            x, f = trial, f_trial
            worst = float(np.abs(f).max())
            if not np.isfinite(worst):
                break
        raise NotConverged(self._worst_equation(f))

    def _worst_equation(self, f: Array) -> str:
        i = int(np.nanargmax(np.abs(f)))
        if i < self.num_nodes:
            return f"balance of {self.network.names('N')[i]}: {f[i] / FLOW_SCALE:.3g} m3/s"
        return f"equation of {self.network.edge_names[i - self.num_nodes]}: {f[i]:.3g} MPa"

    def _residual(self, x: Array, mass: Array, dt: float, controls: Controls, smoothing: float) -> Array:
        """[N + K] residuals; leaves the derivatives in self._values."""
        n, lines = self.num_nodes, self.num_lines
        p, m = x[:n], x[n:]
        p1, p2 = p[self.start], p[self.end]
        f = np.empty(self.size)
        k = self.size - n
        values = self._values
        by_p1, by_p2, by_m = (values[n + (2 + i) * k : n + (3 + i) * k] for i in range(3))

        scale = FLOW_SCALE / dt
        bp = self.beta * p
        f[:n] = (self.capacity * p * (1.0 + bp) - mass) * scale + self._outflow @ m - controls.supply * FLOW_SCALE
        values[:n] = self.capacity * (1.0 + 2.0 * bp) * scale
        f[self.slack] = p[self.slack] - controls.source_pressure
        values[self.slack] = 1.0

        a, b, q = p1[:lines], p2[:lines], m[:lines]
        z = 1.0 / (1.0 + (0.5 * self.beta) * (a + b))
        root = np.sqrt(q * q + FLOW_EPS**2)
        drag = (0.1 * self.resistance) * z  # 0.1 turns MPa2 into MPa near 5 MPa
        drop = drag * q * root
        bend = drop * z * (0.5 * self.beta)
        f[n : n + lines] = drop - 0.1 * (a * a - b * b)
        by_m[:lines] = drag * (root + q * q / root)
        by_p1[:lines] = -0.2 * a - bend
        by_p2[:lines] = 0.2 * b - bend
        self._shut(f[n:], (by_p1, by_p2, by_m), p1, p2, m, controls.opening)
        self._stations(f[n:], (by_p1, by_p2, by_m), p1, p2, m, controls, smoothing)
        return f

    def _shut(self, f: Array, by: tuple[Array, Array, Array], p1: Array, p2: Array, m: Array, opening: Array) -> None:
        """Scales the pressure part of the ball valves by their opening."""
        s = self.slices["B"]
        shut = 1.0 - opening * opening
        a, b = p1[s], p2[s]
        f[s] += shut * (0.1 * (a * a - b * b) + FLOW_SCALE * m[s])
        by[0][s] += shut * 0.2 * a
        by[1][s] -= shut * 0.2 * b
        by[2][s] += shut * FLOW_SCALE

    def _stations(
        self, f: Array, by: tuple[Array, Array, Array], p1: Array, p2: Array, m: Array, c: Controls, smoothing: float
    ) -> None:
        compressors = self.network.compressors
        s = self.slices["C"]
        a, q = p1[s], m[s]
        rise = compressors.max_ratio - 1.0
        load = q / compressors.max_flow
        curve = 1.0 + rise * (1.0 - load * load)
        low, set_share = _smooth_min(c.compressor_set - DROOP * q, a * curve, smoothing)
        low_by_q = -DROOP * set_share - (1.0 - set_share) * a * rise * 2.0 * load / compressors.max_flow
        low_by_a = (1.0 - set_share) * curve
        by_pass = a - OPEN_DROP * q
        negative, pass_share = _smooth_min(-by_pass, -low, smoothing)
        pass_share = np.where(c.compressor_on > 0.5, pass_share, 1.0)
        target = np.where(c.compressor_on > 0.5, -negative, by_pass)
        target_by_a = pass_share + (1.0 - pass_share) * low_by_a
        target_by_q = -OPEN_DROP * pass_share + (1.0 - pass_share) * low_by_q
        self._check_valve(f, by, s, p2[s] - target, q, target_by_a, target_by_q, smoothing)

        s = self.slices["R"]
        a, q = p1[s], m[s]
        target, set_share = _smooth_min(c.regulator_set - DROOP * q, a - OPEN_DROP * q, smoothing)
        target_by_q = -DROOP * set_share - OPEN_DROP * (1.0 - set_share)
        self._check_valve(f, by, s, p2[s] - target, q, 1.0 - set_share, target_by_q, smoothing)
        shut = c.regulator_on < 0.5
        if shut.any():
            f[s] = np.where(shut, FLOW_SCALE * q, f[s])
            by[0][s] = np.where(shut, 0.0, by[0][s])
            by[1][s] = np.where(shut, 0.0, by[1][s])
            by[2][s] = np.where(shut, FLOW_SCALE, by[2][s])

    def _check_valve(
        self,
        f: Array,
        by: tuple[Array, Array, Array],
        s: slice,
        above: Array,
        q: Array,
        target_by_a: Array,
        target_by_q: Array,
        smoothing: float,
    ) -> None:
        """min(scale q, p2 - target) = 0 and its derivatives, for the edges of one kind."""
        f[s], flow_share = _smooth_min(FLOW_SCALE * q, above, smoothing)
        rest = 1.0 - flow_share
        by[0][s] = -rest * target_by_a
        by[1][s] = rest
        by[2][s] = flow_share * FLOW_SCALE - rest * target_by_q

    def _dense(self) -> Any:
        (solve,) = get_lapack_funcs(("gesv",), (np.empty((1, 1)),))
        matrix = np.zeros((self.size, self.size), order="F")
        flat = matrix.reshape(-1, order="F")
        where: Index = self._rows + self._columns * self.size

        def factorise(f: Array) -> Array:
            flat[where] = self._values
            _, _, x, info = solve(matrix, f)
            if info != 0:
                raise NotConverged("singular Jacobian")
            return np.asarray(x)

        return factorise

    def _sparse(self) -> Any:
        shape = (self.size, self.size)
        order = csc_matrix((np.arange(len(self._rows)) + 1.0, (self._rows, self._columns)), shape=shape)
        where = order.data.astype(np.intp) - 1
        matrix = csc_matrix((np.zeros(len(where)), order.indices, order.indptr), shape=shape)

        def factorise(f: Array) -> Array:
            np.take(self._values, where, out=matrix.data)
            try:
                return np.asarray(splu(matrix).solve(f))
            except RuntimeError as error:
                raise NotConverged("singular Jacobian") from error

        return factorise


def _smooth_min(a: Array, b: Array, smoothing: float) -> tuple[Array, Array]:
    """min(a, b) rounded off within `smoothing`, and its derivative by a (that by b is the rest to 1)."""
    gap = a - b
    root = np.sqrt(gap * gap + smoothing * smoothing)
    return 0.5 * (a + b - root), 0.5 * (1.0 - gap / root)
