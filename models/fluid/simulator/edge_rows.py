"""The edges of a network that is being drawn, one by one, and what becomes of them in a Network."""

from __future__ import annotations

from dataclasses import dataclass, field

from trunkline.models.fluid.simulator.topology import Lines


@dataclass
class EdgeRows:
    """Edges as they are added."""

    lines: dict[str, list[tuple[int, int, float, float]]] = field(default_factory=lambda: {k: [] for k in "PHB"})
    valve_open: list[float] = field(default_factory=list)
    valve_events: list[float] = field(default_factory=list)
    valve_unit: list[int] = field(default_factory=list)
    valve_by_pass: list[int] = field(default_factory=list)
    compressors: list[tuple[int, int, float, int]] = field(default_factory=list)  # from, to, max flow, station
    regulators: list[tuple[int, int, float, int]] = field(default_factory=list)

    def add_valve(
        self, a: int, b: int, diameter: float, events: float = 0.0, unit: int = -1, by_pass: int = -1
    ) -> None:
        """A ball valve from node a to b; a by-pass begins shut. Diameter in m."""
        self.lines["B"].append((a, b, 40.0, diameter))
        self.valve_open.append(0.0 if by_pass >= 0 else 1.0)
        self.valve_events.append(events)
        self.valve_unit.append(unit)
        self.valve_by_pass.append(by_pass)

    def lines_of(self, kind: str) -> Lines:
        """Pipes "P", short segments "H" or valves "B", their lengths in whole metres."""
        return Lines.of([(a, b, float(round(length)), diameter) for a, b, length, diameter in self.lines[kind]])
