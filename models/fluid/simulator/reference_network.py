"""The network with the device counts of the reference, of 6,712 variables.

It has 572 nodes, 230 pipes, 32 short segments, 343 ball valves,
23 compressors, 10 control valves, 7 sources and 122 deliveries.

A trunk of 27 junctions and four branches of 25 more are joined by 51 sections. Nine stations hold two or three
compressors each; five pairs of control valves feed city networks; every delivery has a valve.
"""

from __future__ import annotations

from trunkline.models.fluid.simulator.layout import Layout
from trunkline.models.fluid.simulator.plan import draw
from trunkline.models.fluid.simulator.topology import Network

LAYOUT = Layout(
    name="reference",
    seed=572,
    trunk=27,
    branches=((5, 7, True), (11, 6, False), (16, 6, True), (22, 6, False)),
    units={0: 3, 2: 2, 4: 3, 8: 3, 13: 3, 16: 2, 19: 3},
    branch_units={(1, 1): 2, (3, 1): 2},
    supply={0: 430.0, 2: 120.0, 14: 100.0, 20: 100.0, 26: 110.0},
    branch_supply={0: 160.0, 2: 160.0},
    deliveries=122,
    cities=(3, 7, 12, 17, 24),
    city_deliveries=4,
    single=12,
    taps=18,
    metered=11,
    source_pressure=(5.9, 6.2),
    compressor_set=(7.0, 7.5),
    max_ratio=1.7,
    city_set=(3.4, 3.9),
    compressor_events=0.4,
    city_events=0.6,
    line_events=(0.12, 0.06),
    line_reserve=20.0,
    station_reserve=80.0,
    spacing=1.0,
    drop=0.008,
    feeder_km=0.0,
    unit_flow=1.5,
    city_flow=2.0,
    by_passes=True,
    gated=True,
)


def reference() -> Network:
    """The reference network; the same at every call."""
    return draw(LAYOUT)
