"""What a network is drawn from; trunkline.models.fluid.simulator.plan draws it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """Counts, sizes and habits of a network. Flows in m3/s, pressures in MPa, events a day."""

    name: str
    seed: int
    trunk: int  # junctions
    branches: tuple[tuple[int, int, bool], ...]  # junction of the trunk, length, flows inwards
    units: dict[int, int]  # compressors at junctions of the trunk, two or more
    branch_units: dict[tuple[int, int], int]  # branch, its section: compressors
    supply: dict[int, float]  # at junctions of the trunk; the first source has the set pressure
    branch_supply: dict[int, float]  # at ends of branches
    deliveries: int
    cities: tuple[int, ...]  # junctions of the trunk
    city_deliveries: int  # of each city
    single: int  # sections of one line
    taps: int  # deliveries in the middle of a line
    metered: int  # the largest deliveries have a short segment
    source_pressure: tuple[float, float]
    compressor_set: tuple[float, float]
    max_ratio: float
    city_set: tuple[float, float]
    compressor_events: float
    city_events: float
    line_events: tuple[float, float]  # of the valves at the start and at the end of the second of two lines
    line_reserve: float  # what a section carries beyond its planned flow
    station_reserve: float
    spacing: float  # of junctions, in 28 to 42 km
    drop: float  # MPa lost per km at the flow that a line is sized for
    feeder_km: float  # of pipe from a source to its valve; 0 for a short segment
    unit_flow: float  # a compressor's max_flow, as a multiple of what it carries while another of its station is off
    city_flow: float  # what a control valve takes at a drop of 1 MPa, as a multiple of the city's demand
    by_passes: bool  # of stations
    gated: bool  # every delivery has a valve
    ties: tuple[tuple[int, int], ...] = ()  # branches whose ends a line joins, behind a valve that switches
    tie_flow: float = 0.0
    tie_events: float = 0.0
