"""Tokens that are devices: what a FluidDecoder reads and writes where model.tokens is "device".

    Places             which columns belong to which device, and which devices share weights
    DeviceEmbedding    one token a device and minute: [B, T', V, n] -> [B, T'*D, d]
    DeviceProjection   the values of each device from its token, or the loss
    summaries          what a token knows of the minutes before its own

A token holds its device's set-points and states, and the set-points of the whole network, since a switch is felt far
away. Devices with the same quantities share weights; a learned vector tells them apart.

A token looks `window` minutes back, so T minutes give T' = T - window + 1 tokens a device. Older minutes are averaged
over spans that double in length, 1, 1, 2, 4, ... minutes: what leaves a pipe now entered it long ago. Each average is
seen as its difference from the value now, in units of what the value moves in that time, since a minute's change would
be lost in the digits of the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline.kernels.masked_mse import masked_mse
from trunkline.models.fluid.config import DecoderShape
from trunkline.models.fluid.scalar_tokens import Fp32Linear, sinusoids
from trunkline.models.fluid.schema import Schema, devices, parse_column


@dataclass(frozen=True)
class Places:
    """Where the columns of a network's devices stand. The tokens of a minute are the devices, kind after kind.

    inputs   of each kind, [D_k][S_k]: the columns of its devices among the V
    outputs  of each kind, [D_k][R_k]: the states of its devices among the Vs
    """

    inputs: tuple[tuple[tuple[int, ...], ...], ...]
    outputs: tuple[tuple[tuple[int, ...], ...], ...]

    @classmethod
    def of(cls, schema: Schema, own_weights: bool = False) -> Places:
        """The devices of a schema. Those of one letter and with the same set-points and states are of one kind.

        own_weights: each device is a kind of its own
        """
        kinds: dict[tuple[str, tuple[str, ...], tuple[str, ...]], list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
        quantities = [parse_column(name)[1] for name in schema.columns]
        for device in devices(schema):
            boundary = sorted(device.boundary, key=quantities.__getitem__)
            states = sorted((schema.num_boundary + k for k in device.states), key=quantities.__getitem__)
            columns = (*boundary, *states)
            set_points, measured = (tuple(quantities[k] for k in part) for part in (boundary, states))
            kind = (device.name if own_weights else device.kind, set_points, measured)
            kinds.setdefault(kind, []).append((columns, tuple(k - schema.num_boundary for k in states)))
        members = kinds.values()
        return cls(
            tuple(tuple(columns for columns, _ in each) for each in members),
            tuple(tuple(states for _, states in each) for each in members),
        )

    @property
    def num_devices(self) -> int:
        return sum(map(len, self.inputs))

    def among_filled_up(self) -> Tensor:
        """[D] int64: where the devices stand if each kind is filled up to the most devices that one has."""
        most = max(map(len, self.inputs))
        return torch.cat([k * most + torch.arange(len(kind)) for k, kind in enumerate(self.inputs)])


def spans(window: int) -> list[tuple[int, int]]:
    """Ages in minutes, [first, last): (0, 1), (1, 2), (2, 4), (4, 8), ... as far as `window`."""
    edges = [0, 1]
    while edges[-1] < window:
        edges.append(min(2 * edges[-1], window))
    return list(pairwise(edges))


def summaries(normalised: Tensor, window: int, unit: Tensor) -> Tensor:
    """[B, T, V] -> [B, T - window + 1, V, n]: the value now, and now less the mean of each older span, in units.

    unit [V]: what a value moves in a minute; in `age` minutes it moves sqrt(age) of that.
    """
    ages = normalised.unfold(1, window, 1).flip(-1)
    now = ages[..., 0]
    parts = [now]
    for first, last in spans(window)[1:]:
        parts.append((now - ages[..., first:last].mean(-1)) / (unit * ((first + last - 1) / 2) ** 0.5))
    return torch.stack(parts, dim=-1)


class KindLinear(nn.Module):
    """A Linear for each of K kinds, as one product: [K, M, most inputs] -> [K, M, most outputs].

    What a kind does not have of inputs must be zero, and of outputs is not to be read.
    """

    def __init__(self, inputs: Sequence[int], outputs: int) -> None:
        super().__init__()
        bounds = torch.tensor(inputs).clamp(min=1).rsqrt()[:, None, None]  # as nn.Linear draws
        self.weight = nn.Parameter(torch.empty(len(inputs), max(inputs), outputs).uniform_(-1, 1) * bounds)
        self.bias = nn.Parameter(torch.empty(len(inputs), 1, outputs).uniform_(-1, 1) * bounds)

    def forward(self, input: Tensor) -> Tensor:
        """In the dtype of the input, which may be wider than that of the weights."""
        with torch.autocast(input.device.type, enabled=False):
            return torch.baddbmm(self.bias.to(input.dtype), input, self.weight.to(input.dtype))


class DeviceEmbedding(nn.Module):
    """Linear(values -> p) of the device's kind, GELU, LayerNorm, Linear(p -> d), plus set-points, device and minute.

    Kinds are filled up to the most devices and the most values that one has.
    """

    slots: Tensor
    places: Tensor
    minute: Tensor

    def __init__(self, shape: DecoderShape, places: Places, num_boundary: int, window: int, minutes: int) -> None:
        super().__init__()
        self.num_boundary = num_boundary
        count = len(spans(window))
        self.kinds = KindLinear([count * len(each[0]) for each in places.inputs], shape.d_token)
        self.norm = nn.LayerNorm(shape.d_token)
        self.out = nn.Linear(shape.d_token, shape.d_model)
        self.set_points = Fp32Linear(count * num_boundary, shape.d_model)
        self.device = nn.Parameter(torch.randn(places.num_devices, shape.d_model) / 2)
        self.register_buffer("slots", filled_up(places.inputs), persistent=False)
        self.register_buffer("places", places.among_filled_up(), persistent=False)
        self.register_buffer("minute", sinusoids(minutes, shape.d_model, 100.0), persistent=False)

    def forward(self, seen: Tensor) -> Tensor:
        """What `summaries` gives, [B, T', V, n] -> [B, T'*D, d]."""
        B, minutes, _, count = seen.shape
        seen = seen.flatten(0, 1)
        kinds, devices, slots = self.slots.shape
        values = F.pad(seen, (0, 0, 0, 1))[:, self.slots]  # [M, K, devices, slots, count]; slot -1 is the filling, 0
        values = self.kinds(values.transpose(0, 1).reshape(kinds, -1, slots * count))
        values = values.view(kinds, len(seen), devices, -1).transpose(0, 1).flatten(1, 2)[:, self.places]
        tokens = self.out(self.norm(F.gelu(values).to(self.out.weight.dtype)))
        around = self.set_points(seen[:, : self.num_boundary].flatten(1)).to(tokens.dtype)
        tokens = tokens + around[:, None] + self.device
        place = self.minute[:minutes, None].to(tokens.dtype)
        return (tokens.view(B, minutes, *tokens.shape[1:]) + place).flatten(1, 2)


class DeviceProjection(nn.Module):
    """Linear(p -> states) of the device's kind, or that and the loss. A new one says nothing: 0."""

    places: Tensor
    order: Tensor

    def __init__(self, d_token: int, places: Places) -> None:
        super().__init__()
        most = max(len(each[0]) for each in places.outputs)
        self.kinds = KindLinear([d_token] * len(places.outputs), most)
        nn.init.zeros_(self.kinds.weight)
        nn.init.zeros_(self.kinds.bias)
        outputs = filled_up(places.outputs, most)
        devices = torch.zeros(outputs.shape[:2], dtype=torch.int64)  # a filling stands for the first device
        devices.view(-1)[places.among_filled_up()] = torch.arange(places.num_devices)
        self.register_buffer("places", devices, persistent=False)
        read = outputs.flatten() >= 0
        order = torch.empty(int(read.sum()), dtype=torch.int64)
        order[outputs.flatten()[read]] = read.nonzero()[:, 0]  # each state has its place, since each has a device
        self.register_buffer("order", order, persistent=False)

    def forward(self, input: Tensor, target: Tensor | None = None, mask: Tensor | None = None) -> Any:
        """input [B, T', D, p] -> [B, T', Vs], or (sum, count) against target [B, T', Vs] with the weights `mask`."""
        tokens = input.flatten(0, 1)
        kinds, devices = self.places.shape
        values = self.kinds(tokens[:, self.places].transpose(0, 1).reshape(kinds, -1, tokens.shape[-1]))
        values = values.view(kinds, len(tokens), devices, -1).transpose(0, 1).flatten(1)[:, self.order]
        values = values.view(*input.shape[:2], -1)
        return values if target is None else masked_mse(values.float(), target, mask)


def filled_up(kinds: Sequence[Sequence[Sequence[int]]], most: int | None = None) -> Tensor:
    """[K, most devices, most values] int64 of [K][D_k][S_k]; -1 where a kind has fewer."""
    most = max(len(kind[0]) for kind in kinds) if most is None else most
    filled = torch.full((len(kinds), max(map(len, kinds)), most), -1)
    for k, kind in enumerate(kinds):
        filled[k, : len(kind), : len(kind[0])] = torch.tensor(kind).view(len(kind), -1)
    return filled
