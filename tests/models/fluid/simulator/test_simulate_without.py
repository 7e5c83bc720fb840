"""Days of networks that lack a kind of device: they are simulated, balance, and leave no file of that kind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from trunkline.models.fluid.simulator.simulate import NETWORKS, simulate
from trunkline.models.fluid.simulator.topology import Lines, Network, Stations

FILES = {"B": "B", "C": "C", "H": "H", "N": "N", "P": "P", "R": "R", "T": "T&E", "E": "T&E"}
BOUNDARY = {"T": 1, "E": 1, "B": 1, "C": 2, "R": 2}
STATES = {"B": 6, "C": 7, "H": 6, "N": 3, "P": 7, "R": 5, "T": 3, "E": 3}


def _without(kinds: str) -> Network:
    """The demo's network without "C", "R", "B", "H" or its second source, "T". Pipes stand in for "C" and "H"."""
    network = NETWORKS["demo"]()
    none = Stations.of([], (0.0, 0.0), 1.0, 0.0)
    pipes = [*zip(network.pipes.start, network.pipes.end, network.pipes.length, network.pipes.diameter)]
    if "C" in kinds:
        pipes.append((0, 1, 1500.0, 0.65))
        network = replace(network, compressors=none)
    if "R" in kinds:
        network = replace(network, regulators=none)
    if "B" in kinds:
        empty, nothing = np.array([]), np.array([], dtype=np.intp)
        network = replace(network, valves=Lines.of([]), valve_open=empty, valve_events=empty)
        network = replace(network, valve_unit=nothing, valve_by_pass=nothing)
    if "H" in kinds:
        pipes.append((5, 6, 2000.0, 0.21))
        network = replace(network, shorts=Lines.of([]))
    if "T" in kinds:
        one = {name: getattr(network, name)[:1] for name in ("source_node", "source_flow", "source_temperature")}
        network = replace(network, **one)
    return replace(network, pipes=Lines.of(pipes))


@pytest.mark.parametrize("kinds", ["C", "R", "B", "H", "T", "CR", "CRBHT"])
def test_a_day_without_a_kind_of_device(kinds: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = _without(kinds)
    monkeypatch.setitem(NETWORKS, "demo", lambda: network)
    simulate("demo", 1, tmp_path / "out", seed=3, workers=1)
    tables = {path.stem: pl.read_csv(path) for path in (tmp_path / "out/train/case_0001").iterdir()}

    counts = {kind: len(network.names(kind)) for kind in FILES}
    assert all(counts[kind] == (kind == "T") for kind in kinds)
    assert {name for name in FILES.values() if name in tables} == {FILES[kind] for kind in FILES if counts[kind]}
    for name, expected in (("Boundary", BOUNDARY), *((name, STATES) for name in set(FILES.values()) & set(tables))):
        kinds_here = [kind for kind in expected if name in ("Boundary", FILES[kind])]
        assert len(tables[name].columns) == 1 + sum(expected[kind] * counts[kind] for kind in kinds_here)
        assert len(tables[name]) == (48 if name == "Boundary" else 1440)
        assert np.isfinite(tables[name].drop("TIME").to_numpy()).all()

    gained, supplied, delivered = _balance(tables, json.loads((tmp_path / "out/network.json").read_text("utf-8")))
    assert abs(gained - (supplied - delivered)) < 1e-6 * delivered
    switches = tables["Boundary"].select(pl.col("^.*:(ST|FR)$")).to_numpy()
    assert np.diff(switches, axis=0).any() == (switches.shape[1] > 0)


def _balance(tables: dict[str, pl.DataFrame], document: dict[str, Any]) -> tuple[float, float, float]:
    """Normal m3 gained, supplied and delivered from the first minute to the last, as the files say."""
    gas = document["gas"]
    factor = gas["normal_temperature_k"] / (gas["normal_pressure_mpa"] * gas["flow_temperature_k"])
    held = tables["P"].select(pl.sum_horizontal(pl.col("^P_.*_inv$"))).to_series().to_numpy()
    for node in document["nodes"]:
        p = tables["N"][f"{node['name']}_p"].to_numpy()
        held = held + node["volume_m3"] * factor * p * (1 + gas["compressibility_beta"] * p)
    flows = [tables["T&E"].select(pl.col(f"^{kind}_.*_q$")).to_numpy()[1:].sum() for kind in "TE"]
    return float(held[-1] - held[0]), 60.0 * float(flows[0]), 60.0 * float(flows[1])
