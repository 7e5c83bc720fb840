"""Tokens that are devices: what a FluidDecoder reads and writes where model.tokens is "device".

    Places             which columns belong to which device, and which devices share weights
    DeviceEmbedding    one token a device and minute: [B, T, V] -> [B, T'*D, d]
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
    def of(cls, schema: Schema) -> Places:
        """The devices of a schema. Those of one letter and with the same quantities are of one kind."""
        kinds: dict[tuple[str, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
        quantities = [parse_column(name)[1] for name in schema.columns]
        for device in devices(schema):
            boundary = sorted(device.boundary, key=quantities.__getitem__)
            states = sorted((schema.num_boundary + k for k in device.states), key=quantities.__getitem__)
            columns = (*boundary, *states)
            kind = (device.kind, *(quantities[k] for k in columns))
            kinds.setdefault(kind, []).append((columns, tuple(k - schema.num_boundary for k in states)))
        members = kinds.values()
        return cls(
            tuple(tuple(columns for columns, _ in each) for each in members),
            tuple(tuple(states for _, states in each) for each in members),
        )

    @property
    def num_devices(self) -> int:
        return sum(map(len, self.inputs))


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


class DeviceEmbedding(nn.Module):
    """Linear(values -> p) of the device's kind, GELU, LayerNorm, Linear(p -> d), plus set-points, device and minute."""

    minute: Tensor

    def __init__(self, shape: DecoderShape, places: Places, num_boundary: int, window: int, minutes: int) -> None:
        super().__init__()
        self.num_boundary, self.window = num_boundary, window
        count = len(spans(window))
        self.kinds = nn.ModuleList(Fp32Linear(count * len(each[0]), shape.d_token) for each in places.inputs)
        self.norm = nn.LayerNorm(shape.d_token)
        self.out = nn.Linear(shape.d_token, shape.d_model)
        self.set_points = Fp32Linear(count * num_boundary, shape.d_model)
        self.device = nn.Parameter(torch.randn(places.num_devices, shape.d_model) / 2)
        for k, columns in enumerate(places.inputs):
            self.register_buffer(f"columns_{k}", torch.tensor(columns), persistent=False)
        self.register_buffer("minute", sinusoids(minutes, shape.d_model, 100.0), persistent=False)

    def forward(self, normalised: Tensor, moves: Tensor) -> Tensor:
        """normalised [B, T, V]; moves [Vs], of a state in a minute -> [B, T'*D, d]."""
        seen = summaries(normalised, self.window, F.pad(moves, (self.num_boundary, 0), value=1.0))
        B, minutes = seen.shape[:2]
        values = [
            kind(seen[:, :, getattr(self, f"columns_{k}")].flatten(3)) for k, kind in enumerate(self.kinds)
        ]  # of each kind [B, T', D_k, p]
        dtype = self.out.weight.dtype
        tokens = self.out(self.norm(F.gelu(torch.cat(values, dim=2)).to(dtype)))
        around = self.set_points(seen[:, :, : self.num_boundary].flatten(2)).to(dtype)
        place = self.device + self.minute[:minutes, None].to(dtype)
        return (tokens + around[:, :, None] + place).view(B, -1, tokens.shape[-1])


class DeviceProjection(nn.Module):
    """Linear(p -> states) of the device's kind, or that and the loss."""

    order: Tensor

    def __init__(self, d_token: int, outputs: Sequence[Sequence[Sequence[int]]]) -> None:
        super().__init__()
        self.counts = [len(each) for each in outputs]
        # a device that is only steered, such as a valve without measurements, has no states
        self.kinds = nn.ModuleList(nn.Linear(d_token, len(each[0])) if each[0] else _Nothing() for each in outputs)
        for kind in self.kinds:
            for parameter in kind.parameters():
                nn.init.zeros_(parameter)
        given = torch.tensor([state for each in outputs for device in each for state in device])
        self.register_buffer("order", given.argsort(), persistent=False)

    def forward(self, input: Tensor, target: Tensor | None = None, mask: Tensor | None = None) -> Any:
        """input [B, T', D, p] -> [B, T', Vs], or (sum, count) against target [B, T', Vs] where `mask` is true."""
        parts = input.split(self.counts, dim=2)
        values = torch.cat([kind(part).flatten(2) for kind, part in zip(self.kinds, parts)], dim=2)[..., self.order]
        return values if target is None else masked_mse(values.float(), target, mask)


class _Nothing(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return input[..., :0]
