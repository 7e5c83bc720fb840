"""A graph network: messages between the devices along the network's edges, beside a ridge autoregression.

    encode     a Linear for each device, of its own columns of two minutes, and one of all set-points, for every device
    process    ROUNDS times: h += MLP(norm([h, the sums of what arrives over edges of each kind]))
    decode     a Linear for each device, into its states; starts as zero

Battaglia et al., "Relational inductive biases, deep learning, and graph networks" (2018); Sanchez-Gonzalez et al.,
"Learning to simulate complex physics with graph networks" (2020), whose noise the training has, too. A pipe, valve or
station is a device between two nodes, so what those papers keep on edges is here a device's own state.

Chosen on the demo's validation days; RMSE at a minute, 60 minutes and a day after 40 s of one thread, in which a step
costs some ten times that of the MLP for each window. Width 32, decay of weights .1, batch 64 unless said.

                                                     minute   hour    day
    3 rounds, rate .003, average .999                 .0865  .1878  .2492
    5 rounds, rate .003, average .999                 .1109  .2421  .3013
    3 rounds, rate .003, average .998, batch 32       .0841  .1844  .2323
    2 rounds, rate .003, average .998                 .0742  .1705  .2272
    2 rounds, rate .006, average .998                 .0625  .1670  .2187
    2 rounds, rate .01, average .998                  .0718  .1824  .2446
    1 round, rate .006, average .998                  .0744  .1775  .2415
    as it is, after 60 s                              .0532  .1507  .2005
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline.engine.errors import ConfigError
from trunkline.engine.machine.reading import read_object, reason
from trunkline.models.fluid.baselines.residual import Settings
from trunkline.models.fluid.schema import Schema, devices
from trunkline.models.fluid.store import Store

GRAPH = Settings(width=32, learning_rate=6e-3, weight_decay=0.1, batch_size=64, average=0.998)
ROUNDS = 2
_KINDS = 5  # of edges: from a device to its two nodes and back, and between a terminal and its node
_LARGEST_NETWORK = 256 << 20


class GraphNetwork(nn.Module):
    """[B, F] -> [B, Vs], in units. edges: int64 [3, E], from device, to device, kind."""

    inputs: Tensor
    arrange: Tensor
    source: Tensor
    target: Tensor

    def __init__(self, schema: Schema, edges: Tensor, width: int, rounds: int) -> None:
        super().__init__()
        self.num_boundary = schema.num_boundary
        inputs, outputs = _columns_of_devices(schema)
        self.register_buffer("inputs", inputs, persistent=False)
        self.register_buffer("arrange", _places(outputs, schema.num_states), persistent=False)
        self.register_buffer("source", edges[0], persistent=False)
        self.register_buffer("target", edges[1] * _KINDS + edges[2], persistent=False)
        count, slots = inputs.shape
        self.encode = nn.Parameter(torch.randn(count, slots, width) / slots**0.5)
        self.name = nn.Parameter(torch.randn(count, width) / width**0.5)
        self.set_points = nn.Linear(schema.num_boundary, width)
        self.rounds = nn.ModuleList(_Round(width) for _ in range(rounds))
        self.norm = nn.LayerNorm(width)
        self.decode = nn.Parameter(torch.zeros(count, width, outputs.shape[1]))

    def forward(self, z: Tensor) -> Tensor:
        padded = F.pad(z, (0, 1))  # what a device lacks to the most columns is 0
        own = torch.einsum(
            "bds,dsw->bdw", padded.index_select(1, self.inputs.flatten()).view(len(z), *self.inputs.shape), self.encode
        )
        h = own + self.name + self.set_points(z[:, : self.num_boundary])[:, None]
        for each in self.rounds:
            arriving = h.new_zeros(len(h), h.shape[1] * _KINDS, h.shape[2])
            arriving = arriving.index_add(1, self.target, h.index_select(1, self.source)).view(*h.shape[:2], -1)
            h = each(h, arriving)
        decoded = torch.einsum("bdw,dws->bds", self.norm(h), self.decode)
        return decoded.flatten(1).index_select(1, self.arrange)


class _Round(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((1 + _KINDS) * width)
        self.up = nn.Linear((1 + _KINDS) * width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, h: Tensor, arriving: Tensor) -> Tensor:
        return h + self.down(F.gelu(self.up(self.norm(torch.cat([h, arriving], dim=2)))))


def graph(store: Store) -> GraphNetwork:
    """The graph network of a data set. Raises ConfigError if it has no network.json, or one of other devices."""
    path = store.root / "network.json"
    if not path.is_file():
        raise ConfigError(
            f"{store.root}: graph network: this data set has no network.json that says which devices are joined: "
            "put one beside train/ of the source and prepare again, or leave graph out of --baselines"
        )
    return GraphNetwork(store.schema, edges_of(path, store.schema), GRAPH.width, ROUNDS)


def edges_of(path: Path, schema: Schema) -> Tensor:
    """int64 [3, E]: from device, to device and kind of each edge, in both directions. Raises ConfigError.

    Devices without a column in the data are passed over.
    """
    number = {device.name: k for k, device in enumerate(devices(schema))}
    edges = []
    try:
        network = read_object(path, _LARGEST_NETWORK)
        joined: list[dict[str, Any]] = [
            *network["pipes"],
            *(each for its in network["devices"].values() for each in its),
        ]
        for device in joined:
            ends = [(device["from"], 0), (device["to"], 2)] if "from" in device else [(device["node"], 4)]
            for node, kind in ends:
                if device["name"] in number and node in number:
                    a, b = number[device["name"]], number[node]
                    edges += [(a, b, kind), (b, a, min(kind + 1, 4))]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({reason(error)}): leave graph out of --baselines") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a network ({error!r:.100}): leave graph out of --baselines") from error
    if not edges:
        raise ConfigError(f"{path}: joins none of the devices in the data: leave graph out of --baselines")
    return torch.tensor(edges).T.contiguous()


def _columns_of_devices(schema: Schema) -> tuple[Tensor, Tensor]:
    """Places in z of each device's columns [D, S], and its states' places [D, S']; a place past the end fills up."""
    its, states, num_boundary = devices(schema), schema.num_states, schema.num_boundary
    seen = [
        [*device.boundary, *(start + k for start in (num_boundary, num_boundary + states) for k in device.states)]
        for device in its
    ]
    return _filled(seen, num_boundary + 2 * states), _filled([device.states for device in its], states)


def _filled(places: Sequence[Sequence[int]], end: int) -> Tensor:
    most = max(map(len, places))
    return torch.tensor([[*each, *[end] * (most - len(each))] for each in places])


def _places(outputs: Tensor, num_states: int) -> Tensor:
    """[Vs]: where each state stands in the flattened [D, S'] of `outputs`."""
    flat = outputs.flatten()
    where = torch.empty(num_states + 1, dtype=torch.int64)
    where[flat] = torch.arange(len(flat))
    return where[:num_states]
