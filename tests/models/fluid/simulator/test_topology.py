"""The networks: counts, connections and what network.json says."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from trunkline.models.fluid.simulator.simulate import NETWORKS
from trunkline.models.fluid.simulator.topology import Network


def _components(network: Network, edges: np.ndarray) -> int:
    ends = (network.start[edges], network.end[edges])
    matrix = csr_matrix((np.ones(int(edges.sum())), ends), shape=(network.num_nodes, network.num_nodes))
    return int(connected_components(matrix, directed=False)[0])


def test_reference_has_the_counts_of_the_reference_network() -> None:
    network = NETWORKS["reference"]()
    counts = {kind: len(network.names(kind)) for kind in "TENPHCBR"}
    assert counts == {"T": 7, "E": 122, "N": 572, "P": 230, "H": 32, "C": 23, "B": 343, "R": 10}


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_network_is_connected_through_its_usual_position(name: str) -> None:
    network = NETWORKS[name]()
    usual = np.ones(len(network.start), dtype=bool)
    usual[network.edge_slices["B"]] = network.valve_open > 0.5
    assert _components(network, usual) == 1


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_any_ball_valve_that_may_shut_alone_leaves_the_network_connected(name: str) -> None:
    network = NETWORKS[name]()
    usual = np.ones(len(network.start), dtype=bool)
    first = network.edge_slices["B"].start
    usual[network.edge_slices["B"]] = network.valve_open > 0.5
    shutting = np.flatnonzero(network.valve_events > 0)
    assert len(shutting) > 0
    for valve in shutting:
        edges = usual.copy()
        edges[first + valve] = False
        assert _components(network, edges) == 1, network.names("B")[valve]


@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_network_is_the_same_at_every_call(name: str) -> None:
    assert json.dumps(NETWORKS[name]().to_json()) == json.dumps(NETWORKS[name]().to_json())


def test_network_json_names_ends_and_sizes_of_every_device() -> None:
    document = NETWORKS["demo"]().to_json()
    nodes = {node["name"] for node in document["nodes"]}
    assert len(nodes) == 7
    for pipe in document["pipes"]:
        assert {pipe["from"], pipe["to"]} <= nodes
        assert pipe["length_m"] > 0
        assert 0.1 < pipe["diameter_m"] < 1.5
        assert 0.005 < pipe["friction"] < 0.02
    for kind, count in {"H": 1, "B": 1, "C": 1, "R": 1}.items():
        assert [device["name"] for device in document["devices"][kind]] == [f"{kind}_{i + 1:03d}" for i in range(count)]
        assert all({device["from"], device["to"]} <= nodes for device in document["devices"][kind])
    assert all(device["node"] in nodes for kind in "TE" for device in document["devices"][kind])
    assert document["gas"]["specific_gas_constant"] > 0
