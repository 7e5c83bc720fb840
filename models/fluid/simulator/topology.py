"""The network: nodes, the devices between them, and how they are operated.

`demo()` is the small one of the laptop run.

Devices stand on directed edges: P pipes, H short segments, B ball valves, C compressors, R control valves,
in this order. T (sources) and E (deliveries) hang on nodes. Numbers start at 1: P_001 is pipe 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from trunkline.models.fluid.simulator.gas import Array, Gas, darcy_friction

Index = np.ndarray[Any, np.dtype[np.intp]]

ROUGHNESS_M = 3e-5


@dataclass(frozen=True)
class Lines:
    """Edges whose drop comes from a length of pipe: pipes, short segments and open ball valves. Arrays of [K]."""

    start: Index
    end: Index
    length: Array
    diameter: Array

    @classmethod
    def of(cls, rows: list[tuple[int, int, float, float]]) -> Lines:
        """Lines of (start, end, length, diameter), any number of them."""
        start, end, length, diameter = np.array(rows, dtype=float).reshape(-1, 4).T
        return cls(start.astype(np.intp), end.astype(np.intp), length, diameter)

    @property
    def friction(self) -> Array:
        """Darcy friction factor."""
        return darcy_friction(self.diameter, ROUGHNESS_M)

    @property
    def volume(self) -> Array:
        """m3"""
        return np.pi / 4 * self.diameter**2 * self.length

    def __len__(self) -> int:
        return len(self.start)


@dataclass(frozen=True)
class Stations:
    """Compressors or control valves. Arrays of [K].

    `setpoint` [K, 2] is the range of their outlet pressure (MPa). A compressor's ratio falls from `max_ratio` without
    flow to 1 at `max_flow` (m3/s). A control valve never raises pressure; open, it takes `max_flow` at a drop of 1 MPa.
    """

    start: Index
    end: Index
    setpoint: Array
    max_ratio: Array
    max_flow: Array
    events: Array  # how many times a day each is switched off for a while
    station: Index  # those of one station share their set pressure

    @classmethod
    def of(
        cls, rows: list[tuple[int, int, float, int]], setpoint: tuple[float, float], max_ratio: float, events: float
    ) -> Stations:
        """Devices of (start, end, max_flow, station), any number of them, alike in the rest."""
        start, end, max_flow, station = np.array(rows, dtype=float).reshape(-1, 4).T
        full = np.ones(len(rows))
        return cls(
            start=start.astype(np.intp),
            end=end.astype(np.intp),
            setpoint=np.tile(setpoint, (len(rows), 1)),
            max_ratio=max_ratio * full,
            max_flow=max_flow,
            events=events * full,
            station=station.astype(np.intp),
        )

    @property
    def num_stations(self) -> int:
        return int(self.station.max(initial=-1)) + 1

    def __len__(self) -> int:
        return len(self.start)


@dataclass(frozen=True)
class Network:
    """A whole network. Flows in normal m3/s, pressures in MPa, temperatures in degC."""

    name: str
    gas: Gas
    x_km: Array
    y_km: Array
    station_volume: Array  # [N] m3 of piping at a node besides the pipes that meet there
    pipes: Lines
    shorts: Lines
    valves: Lines
    valve_open: Array  # [B] usual position
    valve_events: Array  # [B] how many times a day each leaves it for a while
    valve_unit: Index  # [B] the compressor with which it opens and shuts, -1 for none
    valve_by_pass: Index  # [B] the compressor station whose by-pass it opens when all units are off, -1 for none
    compressors: Stations
    regulators: Stations
    source_node: Index
    source_flow: Array  # [T] usual set flow; that of the pressure source is only its share in a balance
    source_temperature: Array
    pressure_source: int  # the source with a set pressure
    source_pressure: Array  # [2] range of that pressure
    delivery_node: Index
    delivery_flow: Array  # [E] mean demand

    @property
    def num_nodes(self) -> int:
        return len(self.x_km)

    @property
    def start(self) -> Index:
        """[K] start node of every edge, in the order P, H, B, C, R."""
        return np.concatenate([kind.start for kind in self._kinds()])

    @property
    def end(self) -> Index:
        """[K] end node of every edge."""
        return np.concatenate([kind.end for kind in self._kinds()])

    def _kinds(self) -> tuple[Lines | Stations, ...]:
        return (self.pipes, self.shorts, self.valves, self.compressors, self.regulators)

    @property
    def edge_slices(self) -> dict[str, slice]:
        """Where each kind stands among the edges."""
        slices, first = {}, 0
        for kind, devices in zip("PHBCR", self._kinds()):
            slices[kind] = slice(first, first + len(devices))
            first += len(devices)
        return slices

    def names(self, kind: str) -> list[str]:
        """Device names of B, C, E, H, N, P, R or T."""
        counts = {"N": self.num_nodes, "T": len(self.source_node), "E": len(self.delivery_node)}
        counts |= {k: len(devices) for k, devices in zip("PHBCR", self._kinds())}
        return [f"{kind}_{i + 1:03d}" for i in range(counts[kind])]

    @property
    def edge_names(self) -> list[str]:
        return [name for kind in "PHBCR" for name in self.names(kind)]

    def to_json(self) -> dict[str, Any]:
        """network.json: nodes, pipes (from, to, length_m, diameter_m, friction), other devices and gas constants."""
        nodes = self.names("N")

        def ends(kind: str, devices: Lines | Stations) -> list[dict[str, Any]]:
            return [
                {"name": name, "from": nodes[a], "to": nodes[b]}
                for name, a, b in zip(self.names(kind), devices.start, devices.end)
            ]

        def lines(kind: str, devices: Lines) -> list[dict[str, Any]]:
            sizes = zip(devices.length, devices.diameter, devices.friction)
            return [
                end | {"length_m": round(float(size[0]), 3), "diameter_m": float(size[1]), "friction": float(size[2])}
                for end, size in zip(ends(kind, devices), sizes)
            ]

        def at(kind: str, places: Index) -> list[dict[str, Any]]:
            return [{"name": name, "node": nodes[i]} for name, i in zip(self.names(kind), places)]

        sources = at("T", self.source_node)
        for source, temperature in zip(sources, self.source_temperature):
            source["temperature_degc"] = float(temperature)
        compressors = ends("C", self.compressors)
        for compressor, ratio, flow in zip(compressors, self.compressors.max_ratio, self.compressors.max_flow):
            compressor |= {"max_ratio": float(ratio), "max_flow_m3_s": float(flow)}
        regulators = ends("R", self.regulators)
        for regulator, flow in zip(regulators, self.regulators.max_flow):
            regulator |= {"flow_at_1_mpa_m3_s": float(flow)}
        return {
            "name": self.name,
            "gas": self.gas.to_json(),
            "nodes": [
                {"name": name, "x_km": round(float(x), 3), "y_km": round(float(y), 3), "volume_m3": float(volume)}
                for name, x, y, volume in zip(nodes, self.x_km, self.y_km, self.station_volume)
            ],
            "pipes": lines("P", self.pipes),
            "devices": {
                "H": lines("H", self.shorts),
                "B": lines("B", self.valves),
                "C": compressors,
                "R": regulators,
                "T": sources,
                "E": at("E", self.delivery_node),
            },
        }


def demo() -> Network:
    """A source at set pressure, a compressor, two parallel lines (one behind a ball valve) and two deliveries in a ring
    that a control valve can feed: 7 nodes, 94 variables.

        T_001 N1 =C1= N2 ---P1--- N4 ---------P3--------- N6 E_002
                      |           | T_002                 |
                      +B1 N3 --P2-+=R1= N5 -----P4----- N7+H1-   E_001 at N7
    """
    return Network(
        name="demo",
        gas=Gas(),
        x_km=np.array([0.0, 2.0, 4.0, 45.0, 47.0, 70.0, 75.0]),
        y_km=np.array([0.0, 0.0, -6.0, 0.0, -6.0, 15.0, -8.0]),
        station_volume=np.full(7, 20.0),
        pipes=Lines.of([(1, 3, 35e3, 0.65), (2, 3, 35e3, 0.6), (3, 5, 25e3, 0.65), (4, 6, 20e3, 0.7)]),
        shorts=Lines.of([(5, 6, 2000.0, 0.21)]),
        valves=Lines.of([(1, 2, 100.0, 0.35)]),
        valve_open=np.array([1.0]),
        valve_events=np.array([1.2]),
        valve_unit=np.array([-1]),
        valve_by_pass=np.array([-1]),
        compressors=Stations.of([(0, 1, 220.0, 0)], (6.0, 6.5), 1.8, 1.2),
        regulators=Stations.of([(3, 4, 60.0, 0)], (4.8, 5.3), 1.0, 1.2),
        source_node=np.array([0, 3]),
        source_flow=np.array([90.0, 25.0]),
        source_temperature=np.array([18.0, 25.0]),
        pressure_source=0,
        source_pressure=np.array([5.5, 5.8]),
        delivery_node=np.array([6, 5]),
        delivery_flow=np.array([45.0, 65.0]),
    )
