"""Networks drawn by a plan: a trunk of junctions, branches, stations, cities and deliveries.

A generator with a fixed seed draws them. Diameters follow from the flows that the plan's balance gives.

Most sections between junctions are double lines with a valve at each end, so a line can be shut while the other
carries the flow. A station holds two or three compressors in parallel, each between two valves, and a by-pass or
none. A pair of control valves feeds the deliveries of a city. Every delivery has a lateral pipe.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trunkline.models.fluid.simulator.edge_rows import EdgeRows
from trunkline.models.fluid.simulator.gas import Gas, darcy_friction
from trunkline.models.fluid.simulator.layout import Layout
from trunkline.models.fluid.simulator.topology import ROUGHNESS_M, Network, Stations

DIAMETERS = np.array([0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4])


def draw(layout: Layout) -> Network:
    """The network of a layout; the same at every call."""
    return _Plan(layout).network()


@dataclass
class _Section:
    start: int  # junctions, in the direction of the planned flow
    end: int
    length_km: float
    units: int = 0
    flow: float = 0.0


class _Plan:
    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.rng = np.random.default_rng(layout.seed)
        self.gas = Gas()
        self.xy: list[tuple[float, float]] = []
        self.rows = EdgeRows()
        self.deliveries: list[tuple[int, float]] = []
        self.sources: list[tuple[int, float]] = []
        self.junctions = self._junctions()
        self.sections = self._sections()

    def _node(self, x: float, y: float) -> int:
        self.xy.append((x, y))
        return len(self.xy) - 1

    def _junctions(self) -> list[int]:
        """Trunk first, then the branches one after the other."""
        rng, spacing, places = self.rng, self.layout.spacing, []
        x = y = 0.0
        for _ in range(self.layout.trunk):
            places.append((x, y))
            x, y = x + spacing * rng.uniform(28, 42), y + spacing * rng.uniform(-14, 14)
        for i, (foot, length, _) in enumerate(self.layout.branches):
            x, y = places[foot]
            for _ in range(length):
                x = x + spacing * rng.uniform(-4, 16)
                y = y + spacing * (1 if i % 2 == 0 else -1) * rng.uniform(26, 38)
                places.append((x, y))
        return [self._node(*place) for place in places]

    def _branch(self, i: int) -> list[int]:
        """The junctions of branch i, from its foot on the trunk."""
        branches = self.layout.branches
        first = self.layout.trunk + sum(length for _, length, _ in branches[:i])
        return [branches[i][0], *range(first, first + branches[i][1])]

    def _sections(self) -> list[_Section]:
        layout = self.layout
        sections = [
            _Section(j, j + 1, self._distance(j, j + 1), layout.units.get(j, 0)) for j in range(layout.trunk - 1)
        ]
        for i, (_, length, inwards) in enumerate(layout.branches):
            path = self._branch(i)
            for k in range(length):
                a, b = (path[k + 1], path[k]) if inwards else (path[k], path[k + 1])
                sections.append(_Section(a, b, self._distance(a, b), layout.branch_units.get((i, k), 0)))
        return sections

    def _distance(self, a: int, b: int) -> float:
        return float(np.hypot(*np.subtract(self.xy[a], self.xy[b]))) * 1.05

    def _demands(self) -> tuple[np.ndarray, np.ndarray]:
        """What each delivery takes and the junction that it is planned at; cities come last."""
        rng, layout = self.rng, self.layout
        weight = np.full(len(self.junctions), 1.0)
        for i, (_, _, inwards) in enumerate(layout.branches):
            weight[self._branch(i)[1:]] = 0.5 if inwards else 1.4
        count = layout.deliveries - len(layout.cities) * layout.city_deliveries
        at = np.concatenate([np.arange(len(weight)), rng.choice(len(weight), count - len(weight))])
        at = np.concatenate([at, np.repeat(layout.cities, layout.city_deliveries)])
        taken = weight[at] * rng.lognormal(0.0, 0.6, len(at))
        total = sum(layout.supply.values()) + sum(layout.branch_supply.values())
        return np.round(taken * total / taken.sum(), 2), at

    def network(self) -> Network:
        layout = self.layout
        demand, at = self._demands()
        balance = np.bincount(at, -demand, len(self.junctions))
        supplies = dict(layout.supply)
        supplies |= {self._branch(i)[-1]: flow for i, flow in layout.branch_supply.items()}
        for junction, flow in supplies.items():
            balance[junction] += flow
        self._plan_flows(balance)
        for junction, flow in supplies.items():
            self._source(junction, flow)

        leaving = {}
        for station, section in enumerate([section for section in self.sections if section.units]):
            leaving[id(section)] = self._compressors(section, station)
        order = np.argsort([abs(section.flow) for section in self.sections])
        single = {int(i) for i in order[: layout.single]}
        taps = self.rng.choice([i for i in range(len(self.sections)) if i not in single], layout.taps, replace=False)
        middles: dict[int, list[int]] = {}
        for i, section in enumerate(self.sections):
            start = leaving.get(id(section), self.junctions[section.start])
            if i in single:
                self._single_line(section, start, valve=i in order[:3])
            else:
                tap = self._double_line(section, start, tapped=i in taps)
                if tap is not None:
                    middles.setdefault(section.start, []).append(tap)
        for one, other in layout.ties:
            self._tie(self._branch(one)[-1], self._branch(other)[-1])
        cities = {
            junction: self._city(junction, k, demand[at == junction][-layout.city_deliveries :])
            for k, junction in enumerate(layout.cities)
        }
        first_city = len(demand) - len(layout.cities) * layout.city_deliveries
        largest = set(np.argsort(-demand)[: layout.metered].tolist())
        for i, (flow, junction) in enumerate(zip(demand.tolist(), at.tolist())):
            if i >= first_city:
                self._delivery(cities[junction], flow, layout.city_set[0] + 0.2, i in largest)
            elif middles.get(junction) and i >= len(self.junctions):
                self._delivery(middles[junction].pop(), flow, 5.0, i in largest)
            else:
                self._delivery(self.junctions[junction], flow, 5.0, i in largest)
        return self._assemble()

    def _plan_flows(self, balance: np.ndarray) -> None:
        """Flows of the tree of sections that carry each junction's surplus."""
        rest, open_sections = balance.copy(), list(self.sections)
        while open_sections:
            ends = np.bincount([j for s in open_sections for j in (s.start, s.end)], minlength=len(rest))
            for section in list(open_sections):
                for leaf, other, sign in ((section.start, section.end, 1.0), (section.end, section.start, -1.0)):
                    if ends[leaf] == 1 and section in open_sections:
                        section.flow = sign * rest[leaf]
                        rest[other] += rest[leaf]
                        open_sections.remove(section)
                        ends[leaf] -= 1
                        ends[other] -= 1

    def _diameter(self, flow: float, length_km: float, pressure: float, drop: float) -> float:
        """The smallest that carries `flow` over the length with no more than `drop` MPa lost."""
        friction = darcy_friction(DIAMETERS, ROUGHNESS_M)
        lost = self.gas.resistance(np.array(length_km * 1e3), DIAMETERS, friction) * flow**2 * 0.9 / (2 * pressure)
        fits = np.flatnonzero(lost <= drop)
        return float(DIAMETERS[fits[0] if len(fits) else -1])

    def _near(self, node: int) -> int:
        """A new node a few hundred metres away, so that a map can show both."""
        x, y = self.xy[node]
        return self._node(x + self.rng.uniform(-1.5, 1.5), y + self.rng.uniform(-1.5, 1.5))

    def _away(self, node: int, angle: float, length_km: float) -> int:
        x, y = self.xy[node]
        return self._node(x + length_km * np.cos(angle), y + length_km * np.sin(angle))

    def _source(self, junction: int, flow: float) -> None:
        diameter = self._diameter(flow, 1.0, 6.0, 0.02)
        gate = self._near(self.junctions[junction])
        if self.layout.feeder_km:
            plant = self._away(gate, self.rng.uniform(0, 2 * np.pi), self.layout.feeder_km)
            self.rows.lines["P"].append((plant, gate, self.layout.feeder_km * 1e3, diameter))
        else:
            plant = self._near(gate)
            self.rows.lines["H"].append((plant, gate, 400.0, diameter))
        self.rows.add_valve(gate, self.junctions[junction], diameter)
        self.sources.append((plant, flow))

    def _compressors(self, section: _Section, station: int) -> int:
        """A station at the section's start; returns its outlet."""
        reserve = self.layout.station_reserve
        flow = max(section.flow, 0.75 * reserve)
        max_flow = self.layout.unit_flow * (flow + reserve) / (section.units - 1)
        diameter = self._diameter(flow, 1.0, 6.0, 0.02)
        inlet = self._near(self.junctions[section.start])
        outlet = self._near(inlet)
        self.rows.lines["H"].append((self.junctions[section.start], inlet, 300.0, diameter))
        for _ in range(section.units):
            unit = len(self.rows.compressors)
            a, b = self._near(inlet), self._near(outlet)
            self.rows.add_valve(inlet, a, diameter, unit=unit)
            self.rows.add_valve(b, outlet, diameter, unit=unit)
            self.rows.compressors.append((a, b, round(max_flow, 1), station))
        if self.layout.by_passes:
            self.rows.add_valve(inlet, outlet, diameter, by_pass=station)
        return outlet

    def _single_line(self, section: _Section, start: int, valve: bool) -> None:
        flow = abs(section.flow) + self.layout.line_reserve
        diameter = self._diameter(flow, section.length_km, 6.0, self.layout.drop * section.length_km)
        if valve:
            gate = self._near(start)
            self.rows.add_valve(start, gate, diameter)
            start = gate
        self.rows.lines["P"].append((start, self.junctions[section.end], section.length_km * 1e3, diameter))

    def _double_line(self, section: _Section, start: int, tapped: bool) -> int | None:
        """Two lines with a valve at both ends; the second may be shut. Returns the tap in the first."""
        end, length = self.junctions[section.end], section.length_km * 1e3
        flow = abs(section.flow) / 2 + 0.75 * self.layout.line_reserve
        diameter = self._diameter(flow, section.length_km, 6.0, self.layout.drop * section.length_km)
        first, last = self.layout.line_events
        tap = None
        for line in (0, 1):
            a, b = self._near(start), self._near(end)
            self.rows.add_valve(start, a, diameter, events=first * line)
            self.rows.add_valve(b, end, diameter, events=last * line)
            if tapped and line == 0:
                share = self.rng.uniform(0.35, 0.65)
                (x1, y1), (x2, y2) = self.xy[a], self.xy[b]
                tap = self._node(x1 + share * (x2 - x1), y1 + share * (y2 - y1))
                self.rows.lines["P"] += [(a, tap, length * share, diameter), (tap, b, length * (1 - share), diameter)]
            else:
                self.rows.lines["P"].append((a, b, length, diameter))
        return tap

    def _tie(self, a: int, b: int) -> None:
        length = self._distance(a, b)
        diameter = self._diameter(self.layout.tie_flow, length, 6.0, self.layout.drop * length)
        gate = self._near(self.junctions[a])
        self.rows.add_valve(self.junctions[a], gate, diameter, events=self.layout.tie_events)
        self.rows.lines["P"].append((gate, self.junctions[b], length * 1e3, diameter))

    def _city(self, junction: int, station: int, demand: np.ndarray) -> int:
        """A pair of control valves behind a short segment; returns the low pressure node."""
        flow = float(demand.sum())
        inlet = self._near(self.junctions[junction])
        outlet = self._near(inlet)
        self.rows.lines["H"].append((self.junctions[junction], inlet, 300.0, self._diameter(flow, 1.0, 6.0, 0.02)))
        for _ in range(2):
            self.rows.regulators.append((inlet, outlet, round(self.layout.city_flow * flow, 1), station))
        return outlet

    def _delivery(self, node: int, flow: float, pressure: float, metered: bool) -> None:
        angle, length = self.rng.uniform(0, 2 * np.pi), self.rng.uniform(3.0, 14.0)
        diameter = self._diameter(1.4 * flow, length, pressure, 0.15)
        if self.layout.gated:
            gate = self._near(node)
            self.rows.add_valve(node, gate, diameter)
            node = gate
        place = self._away(node, angle, length)
        self.rows.lines["P"].append((node, place, length * 1e3, diameter))
        if metered:
            meter = place
            place = self._near(meter)
            self.rows.lines["H"].append((meter, place, 200.0, diameter))
        self.deliveries.append((place, flow))

    def _assemble(self) -> Network:
        rows, layout = self.rows, self.layout
        source_node, source_flow = (np.array(column) for column in zip(*self.sources))
        delivery_node, delivery_flow = (np.array(column) for column in zip(*self.deliveries))
        x, y = np.array(self.xy).T
        return Network(
            name=layout.name,
            gas=self.gas,
            x_km=np.round(x, 3),
            y_km=np.round(y, 3),
            station_volume=np.full(len(self.xy), 20.0),
            pipes=rows.lines_of("P"),
            shorts=rows.lines_of("H"),
            valves=rows.lines_of("B"),
            valve_open=np.array(rows.valve_open),
            valve_events=np.array(rows.valve_events),
            valve_unit=np.array(rows.valve_unit),
            valve_by_pass=np.array(rows.valve_by_pass),
            compressors=Stations.of(
                rows.compressors, layout.compressor_set, layout.max_ratio, layout.compressor_events
            ),
            regulators=Stations.of(rows.regulators, layout.city_set, 1.0, layout.city_events),
            source_node=source_node,
            source_flow=source_flow,
            source_temperature=np.round(self.rng.uniform(10, 25, len(source_node)), 1),
            pressure_source=0,
            source_pressure=np.array(layout.source_pressure),
            delivery_node=delivery_node,
            delivery_flow=delivery_flow,
        )
