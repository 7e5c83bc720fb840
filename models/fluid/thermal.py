"""Temperatures of nodes and pipes over one step, given the flows: linear, implicit, upwind.

Hydraulics is isothermal, so temperature follows from it and does not act back.

    pipe       M/dt (T_k - T_k old) = |m| (T_up - J (p_up - p_down) - T_k) + h (T_ground - T_k)    T_k leaves the pipe
    H, B, R    T_k = T_up - J (p_up - p_down)                                                      Joule-Thomson
    C          T_k (kelvin) = T_up (1 + head(ratio) / efficiency) while it compresses
    node       0 = sum over inflows of |m| (T_k - T_i) + supply (T_source - T_i) + w (T_i old - T_i)

M is the linepack of the pipe, h its ground conductance and w the heat held by a station's steel over dt, each as the
normal flow of gas that would carry as much.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csc_matrix
from scipy.sparse.linalg import splu

from models.fluid.gas import KELVIN, Array
from models.fluid.hydraulics import DENSE_LIMIT
from models.fluid.topology import Network

STATION_HEAT_M3 = 600.0  # normal m3 of gas with the heat capacity of a node's steel


class Thermal:
    """The heat balance of one network. State: nodes [N] and pipes [P], degC."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.gas = network.gas
        self.start, self.end = network.start, network.end
        self.slices = network.edge_slices
        self.loss = self.gas.ground_conductance(network.pipes.length, network.pipes.diameter)
        self.injected = np.zeros(network.num_nodes)  # temperature of what is fed in at each node

        total = np.zeros(network.num_nodes)
        np.add.at(total, network.source_node, network.source_flow)
        np.add.at(self.injected, network.source_node, network.source_flow * network.source_temperature)
        self.injected = np.divide(self.injected, total, out=np.zeros_like(total), where=total > 0)

    def initial(self) -> tuple[Array, Array]:
        """Everything at ground temperature."""
        ground = self.gas.ground_temperature
        return np.full(self.network.num_nodes, ground), np.full(len(self.network.pipes), ground)

    def step(
        self, nodes: Array, pipes: Array, p: Array, m: Array, inventory: Array, supplied: Array, dt: float
    ) -> tuple[Array, Array, Array]:
        """Temperatures after dt seconds of flow m [K] at pressures p [N].

        `inventory` [P] is the linepack of the pipes (normal m3), `supplied` [N] what sources feed in (m3/s, >= 0).
        Returns nodes [N], pipes [P] and the temperature at which gas leaves each edge [K].
        """
        gas, n = self.gas, self.network.num_nodes
        forward = m >= 0.0
        up = np.where(forward, self.start, self.end)
        down = np.where(forward, self.end, self.start)
        flow = np.abs(m)
        slope = np.ones(len(m))  # temperature out = slope * temperature of the upstream node + offset
        offset = -gas.joule_thomson * (p[up] - p[down])

        s = self.slices["P"]
        held = inventory / dt
        total = held + flow[s] + self.loss
        slope[s] = flow[s] / total
        offset[s] = (flow[s] * offset[s] + held * pipes + self.loss * gas.ground_temperature) / total

        s = self.slices["C"]
        ratio = p[self.end[s]] / p[self.start[s]]
        gain = np.where(flow[s] > 0.1, gas.isentropic_head(ratio) / gas.compressor_efficiency, 0.0)
        slope[s] = 1.0 + gain
        offset[s] = np.where(ratio > 1.0, KELVIN * gain, offset[s])

        kept = STATION_HEAT_M3 / dt
        right = np.bincount(down, flow * offset, n) + supplied * self.injected
        right += kept * nodes
        diagonal = np.bincount(down, flow, n) + supplied + kept
        if n <= DENSE_LIMIT:
            matrix = np.diag(diagonal) - np.bincount(down * n + up, flow * slope, n * n).reshape(n, n)
            nodes = np.linalg.solve(matrix, right)
        else:
            places = np.arange(n)
            rows, columns = np.concatenate([places, down]), np.concatenate([places, up])
            sparse = csc_matrix((np.concatenate([diagonal, -flow * slope]), (rows, columns)), shape=(n, n))
            nodes = splu(sparse).solve(right)
        out = slope * nodes[up] + offset
        return nodes, out[self.slices["P"]], out
