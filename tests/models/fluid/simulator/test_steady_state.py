"""The simulation under constant set-points settles to a steady state that another solver finds.

The other solver knows network.json and a row of Boundary.csv and shares no code with the simulator. It is the linear
theory method on squares of pressures: each line is a conductance 1 / (k Z |q|) with q of the sweep before, stations are
rows of their own whose control mode is revised until it is consistent.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from trunkline.models.fluid.simulator import scenario
from trunkline.models.fluid.simulator.scenario import Day, random_day
from trunkline.models.fluid.simulator.simulate import NETWORKS, describe
from trunkline.models.fluid.simulator.topology import Network
from trunkline.models.fluid.simulator.transient import Record, Step, run, settling


class SteadyState:
    """Pressures (MPa) by node, flows (m3/s) by edge and the mode of each station, from network.json and set-points."""

    def __init__(self, document: dict[str, Any], boundary: dict[str, float]) -> None:
        self.boundary = boundary
        gas, devices = document["gas"], document["devices"]
        self.nodes = {node["name"]: i for i, node in enumerate(document["nodes"])}
        self.beta = gas["compressibility_beta"]
        self.droop = document["equations"]["set_pressure_droop_mpa_s_per_m3"]
        self.by_pass = document["equations"]["by_pass_drop_mpa_s_per_m3"]
        normal = gas["normal_pressure_mpa"] * 1e6 / gas["specific_gas_constant"] / gas["normal_temperature_k"]
        rt = gas["specific_gas_constant"] * gas["flow_temperature_k"]
        self.lines = [line for line in document["pipes"] + devices["H"] + devices["B"] if self._open(line["name"])]
        self.k = np.array(
            [
                line["friction"] * line["length_m"] / line["diameter_m"] * rt
                * (normal / (math.pi / 4 * line["diameter_m"] ** 2)) ** 2 * 1e-12
                for line in self.lines
            ]
        )  # fmt: skip
        self.stations = devices["C"] + devices["R"]
        self.mode = {s["name"]: "set" if self._on(s["name"]) or s["name"][0] == "C" else "off" for s in self.stations}
        self.inflow = np.zeros(len(self.nodes))
        for device in devices["T"] + devices["E"]:
            if f"{device['name']}:SP" in boundary:
                self.slack, self.slack_pressure = self.nodes[device["node"]], boundary[f"{device['name']}:SP"]
            else:
                sign = 1.0 if device["name"][0] == "T" else -1.0
                self.inflow[self.nodes[device["node"]]] += sign * boundary[f"{device['name']}:SNQ"]
        self._solve()

    def _open(self, name: str) -> bool:
        return name[0] != "B" or self.boundary[f"{name}:FR"] > 0.5

    def _on(self, name: str) -> bool:
        return self.boundary[f"{name}:ST"] > 0.5

    def _solve(self) -> None:
        n, lines, stations = len(self.nodes), self.lines, self.stations
        a = np.array([self.nodes[line["from"]] for line in lines])
        b = np.array([self.nodes[line["to"]] for line in lines])
        squares = np.full(n, self.slack_pressure**2)
        q, through = np.full(len(lines), 20.0), np.full(len(stations), 20.0)
        for sweep in range(400):
            p = np.sqrt(np.maximum(squares, 0.01))
            z = 1 / (1 + self.beta * (p[a] + p[b]) / 2)
            g = 1 / (self.k * z * np.maximum(np.abs(q), 1e-3))
            matrix, right = np.zeros((n + len(stations),) * 2), np.zeros(n + len(stations))
            for rows, columns, sign in ((a, a, 1), (a, b, -1), (b, b, 1), (b, a, -1)):
                np.add.at(matrix, (rows, columns), sign * g)
            right[:n] = self.inflow
            for j, station in enumerate(stations):
                i, o, row = self.nodes[station["from"]], self.nodes[station["to"]], n + j
                matrix[i, row], matrix[o, row] = 1.0, -1.0
                self._row(station, matrix[row], right, row, (i, o), (p[i], p[o]), through[j])
            matrix[self.slack], right[self.slack] = 0.0, self.slack_pressure**2
            matrix[self.slack, self.slack] = 1.0
            # A node that every valve cuts off keeps whatever it had; here it stays as it is.
            cut_off = np.flatnonzero(np.abs(matrix[:n, :n]).sum(axis=1) == 0)
            matrix[cut_off, cut_off], right[cut_off] = 1.0, squares[cut_off]
            solution = np.linalg.solve(matrix, right)
            new = g * (solution[a] - solution[b])
            change = max(np.abs(new - q).max(), np.abs(solution[n:] - through).max())
            squares, q, through = solution[:n], 0.5 * (q + new), 0.5 * (through + solution[n:])
            if sweep % 8 == 7 and not self._revise(np.sqrt(np.maximum(squares, 0.01)), through) and change < 1e-5:
                break
        else:
            raise AssertionError("the independent solver did not converge")
        self.p = dict(zip(self.nodes, np.sqrt(squares)))
        self.q = dict(zip([line["name"] for line in lines], q)) | {
            station["name"]: flow for station, flow in zip(stations, through)
        }

    def _row(
        self,
        station: dict[str, Any],
        row: np.ndarray,
        right: np.ndarray,
        at: int,
        ends: tuple[int, int],
        p: tuple[float, float],
        q: float,
    ) -> None:
        """The linearised equation of a station in its present mode: columns of its end nodes and its own flow."""
        name, (i, o) = station["name"], ends
        mode = self.mode[name]
        if mode in ("off", "check"):
            row[at] = 1.0
        elif mode == "set":
            setpoint = self._setpoint(name)
            row[o], row[at], right[at] = 1.0, 2 * setpoint * self.droop, setpoint**2
        elif mode == "limit":
            rise, full = station["max_ratio"] - 1, station["max_flow_m3_s"]
            curve, slope = 1 + rise * (1 - (q / full) ** 2), -2 * rise * q / full**2
            row[o], row[i], row[at] = 1.0, -(curve**2), -2 * curve * slope * p[0] ** 2
            right[at] = -2 * curve * slope * p[0] ** 2 * q
        else:
            row[i], row[o], row[at] = 1.0, -1.0, -(p[0] + p[1]) * self._drop(station)

    def _setpoint(self, name: str) -> float:
        return self.boundary[f"{name}:{'SP_out' if name[0] == 'C' else 'SPD'}"]

    def _drop(self, station: dict[str, Any]) -> float:
        return self.by_pass if station["name"][0] == "C" else 1 / station["flow_at_1_mpa_m3_s"]

    def _revise(self, p: np.ndarray, through: np.ndarray) -> bool:
        """Puts every station into the mode that its pressures and flow ask for; says whether one changed."""
        changed = False
        for station, q in zip(self.stations, through):
            name = station["name"]
            if self.mode[name] == "off":
                continue
            p1, p2 = p[self.nodes[station["from"]]], p[self.nodes[station["to"]]]
            targets = {"open": p1 - self._drop(station) * q}
            if self._on(name):
                targets["set"] = self._setpoint(name) - self.droop * q
                if name[0] == "C":
                    targets["limit"] = p1 * (1 + (station["max_ratio"] - 1) * (1 - (q / station["max_flow_m3_s"]) ** 2))
            mode = min((m for m in targets if m != "open" or name[0] == "R"), key=lambda m: targets[m], default="open")
            if name[0] == "C" and targets["open"] > targets[mode]:
                mode = "open"
            if (self.mode[name] == "check" and p2 >= targets[mode] - 1e-9) or q < -1e-3:
                mode = "check"
            changed |= mode != self.mode[name]
            self.mode[name] = mode
        return changed


def _settled(network: Network, day: Day, row: int) -> Record:
    """A month under one row, minute by minute for the first hour, from the settled state of row 0."""
    steps = settling(0) + [Step(row, 60.0, 0)] * 60 + [Step(row, 900.0, 0)] * 90 + [Step(row, 86400.0, 0)] * 30
    return run(network, day, steps, "test")


def _compare(network: Network, record: Record, steady: SteadyState) -> tuple[float, float]:
    """The largest errors of pressure (relative) and flow (of the flow, less 0.1 m3/s)."""
    names = network.names("N")
    live = set()
    for name, a, b in zip(network.edge_names, network.start, network.end):
        if abs(steady.q.get(name, 0.0)) > 1e-3 or name[0] in "PH":
            live |= {a, b}
    p = np.array([steady.p[name] for name in names])
    pressure = max(abs(record.p[-1, i] / p[i] - 1) for i in live)
    flows = np.array([steady.q.get(name, 0.0) for name in network.edge_names])
    error = np.maximum(np.abs(record.m[-1] - flows) - 0.1, 0.0) / np.maximum(np.abs(flows), 1.0)
    return float(pressure), float(error.max())


def _boundary(network: Network, day: Day, row: int) -> dict[str, float]:
    return dict(zip(scenario.columns(network), day.table(network)[row - scenario.BEFORE].tolist()))


@pytest.fixture(scope="module")
def document() -> dict[str, dict[str, Any]]:
    """network.json of every network."""
    return {name: json.loads(describe(name, seed=0)) for name in NETWORKS}


DEMO_SETTINGS = {
    "as planned": ({}, {"C_001": "set", "R_001": "set"}),
    "compressor off": ({"compressor_on": 0.0}, {"C_001": "open"}),
    "set below the inlet": ({"compressor_set": 5.2}, {"C_001": "open"}),
    "beyond the compressor": ({"compressor_set": 9.9}, {"C_001": "limit"}),
    "valve shut": ({"opening": 0.0}, {"C_001": "set", "R_001": "set"}),
    "control valve off": ({"regulator_on": 0.0}, {"R_001": "off"}),
    "control valve wide open": ({"regulator_set": 6.2}, {"R_001": "open"}),
    "control valve held shut": ({"regulator_set": 3.0}, {"R_001": "check"}),
}


@pytest.mark.parametrize("setting", sorted(DEMO_SETTINGS))
def test_demo_settles_to_the_independent_steady_state(setting: str, document: dict[str, dict[str, Any]]) -> None:
    changes, modes = DEMO_SETTINGS[setting]
    network, row = NETWORKS["demo"](), scenario.BEFORE
    day = random_day(network, np.random.default_rng(1))
    day.compressor_on[:], day.regulator_on[:], day.opening[:], day.regulator_set[:] = 1.0, 1.0, 1.0, 5.7
    for name, value in changes.items():
        getattr(day, name)[row] = value
    record = _settled(network, day, row)
    assert np.abs(record.p[-1] - record.p[-3]).max() < 1e-5, "nothing has moved for two days"
    steady = SteadyState(document["demo"], _boundary(network, day, row))
    assert {name: steady.mode[name] for name in modes} == modes
    pressure, flow = _compare(network, record, steady)
    assert pressure < 1e-3
    assert flow < 1e-3


@pytest.mark.parametrize(("name", "seed"), [("reference", 0), ("reference", 1), ("regional", 0), ("regional", 1)])
def test_a_whole_network_settles_to_the_independent_steady_state(
    name: str, seed: int, document: dict[str, dict[str, Any]]
) -> None:
    network, row = NETWORKS[name](), scenario.BEFORE + 20
    day = random_day(network, np.random.default_rng(seed))
    record = _settled(network, day, row)
    assert np.abs(record.p[-1] - record.p[-3]).max() < 1e-3, "nothing has moved for two days"
    pressure, flow = _compare(network, record, SteadyState(document[name], _boundary(network, day, row)))
    assert pressure < 1e-3
    assert flow < 1e-3


def test_the_comparison_would_see_a_wrong_friction(document: dict[str, dict[str, Any]]) -> None:
    network, row = NETWORKS["demo"](), scenario.BEFORE
    day = random_day(network, np.random.default_rng(1))
    day.compressor_on[:] = 1.0
    wrong = json.loads(json.dumps(document["demo"]))
    wrong["pipes"][0]["friction"] *= 1.3
    record = _settled(network, day, row)
    assert max(_compare(network, record, SteadyState(wrong, _boundary(network, day, row)))) > 0.01
