"""The graph network: which devices are joined, how far messages reach, and what data sets it cannot be made for."""

import json

import pytest
import torch

from tests.models.fluid.baselines.switched_network import SCHEMA, write_switched_store
from trunkline.engine.errors import ConfigError
from trunkline.models.fluid.baselines.graph import GraphNetwork, edges_of, graph
from trunkline.models.fluid.schema import devices, parse_column


@pytest.fixture
def store(tmp_path):
    return write_switched_store(tmp_path)


def test_edges_are_those_of_the_network_in_both_directions(store):
    names = [device.name for device in devices(SCHEMA)]
    assert names == ["C_001", "E_001", "N_001", "N_002", "N_003", "P_001"]
    edges = {(names[a], names[b], kind) for a, b, kind in edges_of(store.root / "network.json", SCHEMA).T.tolist()}
    assert edges == {
        ("C_001", "N_001", 0), ("N_001", "C_001", 1), ("C_001", "N_002", 2), ("N_002", "C_001", 3),
        ("P_001", "N_002", 0), ("N_002", "P_001", 1), ("P_001", "N_003", 2), ("N_003", "P_001", 3),
        ("E_001", "N_003", 4), ("N_003", "E_001", 4),
    }  # fmt: skip


@pytest.mark.parametrize("rounds", [0, 1, 2, 5])
def test_messages_reach_one_edge_a_round(store, rounds):
    # E_001 - N_003 - P_001 - N_002 - C_001 - N_001
    distance = {"E_001": 0, "N_003": 1, "P_001": 2, "N_002": 3, "C_001": 4, "N_001": 5}
    torch.manual_seed(0)
    network = GraphNetwork(SCHEMA, edges_of(store.root / "network.json", SCHEMA), 16, rounds).double()
    torch.nn.init.normal_(network.decode)
    z = torch.randn(1, 14, dtype=torch.float64)
    moved = z.clone()
    moved[0, [k for k, name in enumerate((*SCHEMA.columns, *SCHEMA.states)) if name == "E_001_q"]] += 1
    for name, before, after in zip(SCHEMA.states, network(z)[0], network(moved)[0], strict=True):
        assert (before != after).item() == (distance[parse_column(name)[0]] <= rounds), name


def test_set_points_reach_every_device_at_once(store):
    torch.manual_seed(0)
    network = GraphNetwork(SCHEMA, edges_of(store.root / "network.json", SCHEMA), 16, 0)
    torch.nn.init.normal_(network.decode)
    z = torch.randn(1, 14)
    moved = z.clone()
    moved[0, 1] += 1
    assert (network(z) != network(moved)).all()


def test_it_starts_as_the_ridge(store):
    assert torch.equal(graph(store)(torch.randn(3, 14)), torch.zeros(3, 6))


def test_a_data_set_without_a_network_is_refused_by_name(store):
    path = store.root / "network.json"
    path.write_text(json.dumps({"pipes": [{"name": "P_009", "from": "N_008", "to": "N_009"}], "devices": {}}))
    with pytest.raises(ConfigError, match="joins none of the devices"):
        graph(store)
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"network\.json: cannot be read"):
        graph(store)
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"network\.json: not a network"):
        graph(store)
    path.unlink()
    with pytest.raises(ConfigError, match=r"has no network\.json"):
        graph(store)
