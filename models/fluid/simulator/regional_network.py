"""A regional network of 877 variables: larger than the demo, small enough to train on without a GPU.

Three stations of two compressors, two cities behind pairs of control valves, three double lines, and a ring that a ball
valve opens and shuts. Sources stand behind 10 km of pipe, so the temperature that arrives moves with the flow.
Compressors and control valves are sized so that the loss of one is felt at the others.
"""

from __future__ import annotations

from trunkline.models.fluid.simulator.layout import Layout
from trunkline.models.fluid.simulator.plan import draw
from trunkline.models.fluid.simulator.topology import Network

LAYOUT = Layout(
    name="regional",
    seed=4,
    trunk=6,
    branches=((2, 2, False), (1, 1, True), (3, 1, False), (4, 1, False)),
    units={0: 2, 3: 2},
    branch_units={(3, 0): 2},
    supply={0: 110.0},
    branch_supply={0: 35.0, 1: 35.0},
    deliveries=16,
    cities=(2, 5),
    city_deliveries=2,
    single=7,
    taps=1,
    metered=2,
    source_pressure=(5.6, 5.8),
    compressor_set=(6.6, 7.2),
    max_ratio=1.7,
    city_set=(4.4, 4.8),
    compressor_events=0.5,
    city_events=0.6,
    line_events=(0.4, 0.2),
    line_reserve=8.0,
    station_reserve=5.0,
    spacing=0.5,
    drop=0.01,
    feeder_km=10.0,
    unit_flow=0.75,
    city_flow=0.5,
    by_passes=False,
    gated=False,
    ties=((0, 2),),
    tie_flow=25.0,
    tie_events=1.0,
)


def regional() -> Network:
    """The regional network; the same at every call."""
    return draw(LAYOUT)
