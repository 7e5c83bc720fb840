"""Temperatures of nodes and pipes, given the flows: linear, implicit in time, upwind.

Hydraulics is isothermal, so temperatures follow from it and do not act back: a whole run is solved afterwards.

    pipe       M/dt (T_k - T_k old) = |m| (T_up - J (p_up - p_down) - T_k) + h (T_ground - T_k)    T_k leaves the pipe
    H, B, R    T_k = T_up - J (p_up - p_down)                                                      Joule-Thomson
    C          T_k (kelvin) = T_up (1 + head(ratio) / efficiency) while it compresses
    node       0 = sum over inflows of |m| (T_k - T_i) + supply (T_source - T_i) + w (T_i old - T_i)

M is the linepack of the pipe, h its ground conductance and w the heat held by a station's steel over dt, each as the
normal flow of gas that would carry as much.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.sparse import csc_matrix
from scipy.sparse.linalg import splu

from trunkline.models.fluid.simulator.gas import KELVIN, Array
from trunkline.models.fluid.simulator.hydraulics import DENSE_LIMIT
from trunkline.models.fluid.simulator.topology import Index, Network

STATION_HEAT_M3 = 600.0  # normal m3 of gas with the heat capacity of a node's steel


def temperatures(network: Network, p: Array, m: Array, source_flow: Array, dt: Array) -> tuple[Array, Array]:
    """Temperatures over S steps of dt [S] s under pressures p [S, N], flows m [S, K], source_flow [S, T].

    All starts at ground temperature. Returns, in degC, the nodes [S, N] and the gas that leaves each edge [S, K].
    """
    gas, n = network.gas, network.num_nodes
    start, end, slices = network.start, network.end, network.edge_slices
    steps = np.arange(len(p))[:, None]
    forward = m >= 0.0
    up, down = np.where(forward, start, end), np.where(forward, end, start)
    flow = np.abs(m)
    # Gas leaves an edge at slope * T_up + offset + memory * T_k old.
    slope = np.ones_like(m)
    offset = -gas.joule_thomson * (p[steps, up] - p[steps, down])

    s, pipes = slices["P"], network.pipes
    half = 0.5 * pipes.volume
    held = (gas.linepack(half, p[:, pipes.start]) + gas.linepack(half, p[:, pipes.end])) / dt[:, None]
    loss = gas.ground_conductance(pipes.length, pipes.diameter)
    total = held + flow[:, s] + loss
    slope[:, s] = flow[:, s] / total
    offset[:, s] = (flow[:, s] * offset[:, s] + loss * gas.ground_temperature) / total
    memory = held / total

    s = slices["C"]
    ratio = p[:, end[s]] / p[:, start[s]]
    gain = np.where(flow[:, s] > 0.1, gas.isentropic_head(ratio) / gas.compressor_efficiency, 0.0)
    slope[:, s] = 1.0 + gain
    offset[:, s] = np.where(ratio > 1.0, KELVIN * gain, offset[:, s])

    fed, heat = np.zeros_like(p), np.zeros_like(p)
    for j, i in enumerate(network.source_node):
        supply = np.maximum(source_flow[:, j], 0.0)
        fed[:, i] += supply
        heat[:, i] += supply * network.source_temperature[j]
    kept = STATION_HEAT_M3 / dt
    cells = steps * n + down
    arriving = np.bincount(cells.ravel(), flow.ravel(), p.size).reshape(p.shape)
    diagonal = arriving + fed + kept[:, None]
    constant = heat + np.bincount(cells.ravel(), (flow * offset).ravel(), p.size).reshape(p.shape)
    solvers = _solvers(diagonal, flow * slope, up, down)

    t_nodes, t_edges = np.empty_like(p), np.empty_like(m)
    nodes = np.full(n, gas.ground_temperature)
    inside = np.full(len(pipes), gas.ground_temperature)
    s = slices["P"]
    carried = flow[:, s] * memory
    for i in range(len(p)):
        right = constant[i] + kept[i] * nodes + np.bincount(down[i, s], carried[i] * inside, n)
        nodes = solvers(i, right)
        leaving = slope[i] * nodes[up[i]] + offset[i]
        leaving[s] += memory[i] * inside
        inside = leaving[s]
        t_nodes[i], t_edges[i] = nodes, leaving
    return t_nodes, t_edges


def _solvers(diagonal: Array, gain: Array, up: Index, down: Index) -> Callable[[int, Array], Array]:
    """solve(i, right) for the matrix of step i: `diagonal` [S, N] less `gain` [S, K] in row `down`, column `up`."""
    steps, n = diagonal.shape
    if n <= DENSE_LIMIT:
        cells = (np.arange(steps)[:, None] * n + down) * n + up
        coupling = np.bincount(cells.ravel(), gain.ravel(), steps * n * n).reshape(steps, n, n)
        inverse = np.linalg.inv(diagonal[:, :, None] * np.eye(n) - coupling)
        return lambda i, right: inverse[i] @ right

    places = np.arange(n)

    def solve(i: int, right: Array) -> Array:
        rows, columns = np.concatenate([places, down[i]]), np.concatenate([places, up[i]])
        matrix = csc_matrix((np.concatenate([diagonal[i], -gain[i]]), (rows, columns)), shape=(n, n))
        return np.asarray(splu(matrix).solve(right))

    return solve
