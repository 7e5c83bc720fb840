"""FluidDecoder: a Transformer over the tokens of a gas network, minute after minute.

    tokens "scalar"    x [B, T, V] -> one token a value,  [B, T*V, d_model]  -> blocks -> [B, T, Vs]
    tokens "device"    x [B, T, V] -> one token a device, [B, T'*D, d_model] -> blocks -> [B, T', Vs]

The result is the state one minute later. T' = T - window + 1. A token at minute s attends to every token at minutes
<= s (attention that is block-causal with block V or D). The set-points of minute s+1, which are known, stand in the
tokens of minute s. The network's output u becomes the prediction in normalised units as  base + unit * u:

    target "level"    base = 0                        unit = 1
    target "change"   base = the state at minute s    unit = the size of a minute's change and of the input noise
    linear skip       base = what the ridge autoregression of trunkline.models.fluid.ridge predicts
    dense skip        u    = the decoder's output + that of a small network over all values at once
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline.kernels.attention import flash_attention
from trunkline.kernels.masked_mse import masked_mse
from trunkline.models.fluid.config import DecoderShape
from trunkline.models.fluid.device_tokens import DeviceEmbedding, DeviceProjection, Places, spans, summaries
from trunkline.models.fluid.normalization import Normalization
from trunkline.models.fluid.ridge import Features, RidgeAutoregression, two_minutes
from trunkline.models.fluid.scalar_tokens import Projection, TokenEmbedding


class FluidDecoder(nn.Module):
    """The surrogate. Inputs and predictions are in physical units; normalisation statistics are buffers of it.

    places: where the devices' columns stand, for tokens "device"; None for tokens "scalar"
    window: minutes that a device's token looks back, 1 for its own only
    linear_skip: what the ridge autoregression sees; None for no linear skip
    """

    _no_split_modules: ClassVar[list[str]] = ["DecoderBlock"]

    def __init__(
        self,
        shape: DecoderShape,
        *,
        num_boundary: int,
        num_states: int,
        history: int,
        target: str = "level",
        input_noise: float = 0.0,
        linear_skip: Features | None = None,
        dense_skip: int = 0,
        places: Places | None = None,
        window: int = 1,
    ) -> None:
        super().__init__()
        self.shape, self.history, self.target, self.input_noise = shape, history, target, input_noise
        self.num_boundary, self.num_states, self.window = num_boundary, num_states, window
        num_variables = num_boundary + num_states
        self.normalization = Normalization(num_boundary, num_states)
        self.skip = RidgeAutoregression(num_boundary, num_states, linear_skip) if linear_skip is not None else None
        self.by_device = places is not None
        features = num_variables * len(spans(window)) if self.by_device else num_variables + num_states
        self.dense = DenseSkip(features, num_states, dense_skip) if dense_skip else None
        self.embedding: TokenEmbedding | DeviceEmbedding
        self.projection: Projection | DeviceProjection
        if places is None:
            tokens, self.first_state = num_variables, num_boundary
            self.embedding = TokenEmbedding(shape, history, num_variables)
        else:
            tokens, self.first_state = places.num_devices, 0
            self.embedding = DeviceEmbedding(shape, places, num_boundary, window, history - window + 1)
        self.tokens_per_minute = tokens
        self.blocks = nn.ModuleList(DecoderBlock(shape, tokens) for _ in range(shape.num_layers))
        self.norm = nn.LayerNorm(shape.d_model)
        self.head = nn.Sequential(nn.Linear(shape.d_model, shape.d_token), nn.GELU(), nn.LayerNorm(shape.d_token))
        self.projection = Projection(shape.d_token) if places is None else DeviceProjection(shape.d_token, places)

    def forward(
        self, x: Tensor, target: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The next states, or, given a target, the loss.

        x       [B, T, V] fp32, physical: boundary(s+1) then state(s) for T minutes s; NaN where missing
        target  [B, T', Vs] fp32, physical: state(s+1) of the last T' minutes; anything where `mask` is false
        mask    [B, T', Vs] bool: whether the target is present; or fp32: what it counts, 0 where it is missing

        Without target: state(s+1) as predicted, [B, T', Vs] fp32, physical. With it: (sum, count) of the squared error
        in the units of the network's output, two fp32 scalars. The boundary is neither predicted nor in the loss.
        T' = T - window + 1.

        With a target, x may have more minutes than the history, and the target as many more. The model is then rolled
        out: of those minutes it sees the boundary, and as states its own predictions, through which gradients flow.
        """
        normalised = self.normalization.normalize(x)
        if target is None:
            output, base, unit = self._predict(normalised)
            return self.normalization.restore_states(base + unit * output)
        wanted = self.normalization.normalize_states(target)
        assert mask is not None
        if x.shape[1] > self.history:
            return self._rolled_out(normalised, wanted, mask)
        if self.dense is None:
            base, unit = self._base(normalised)
            return self.projection(self._decode(self._seen(normalised)), (wanted - base) / unit, mask)
        output, base, unit = self._predict(normalised)
        return masked_mse(output, (wanted - base) / unit, mask)

    def _rolled_out(self, normalised: Tensor, wanted: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        boundary, states = normalised[..., : self.num_boundary], normalised[:, : self.history, self.num_boundary :]
        minutes = self.history - self.window + 1
        errors = []
        for first in range(normalised.shape[1] - self.history + 1):
            window = torch.cat([boundary[:, first : first + self.history], states], dim=-1)
            output, base, unit = self._predict(window)
            new = minutes if first == 0 else 1  # the minutes before them are in the loss already
            rows = slice(first + minutes - new, first + minutes)
            target = (wanted[:, rows] - base[:, -new:]) / unit
            errors.append(masked_mse(output[:, -new:], target, mask[:, rows]))
            states = torch.cat([states[:, 1:], (base + unit * output)[:, -1:]], dim=1)
        totals, counts = zip(*errors)
        return torch.stack(totals).sum(), torch.stack(counts).sum()

    def _predict(self, normalised: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(output, base, unit): the prediction is base + unit * output. [B, T', Vs], the same, [Vs]; fp32."""
        base, unit = self._base(normalised)
        seen = self._seen(normalised)
        output = self.projection(self._decode(seen)).float()
        if self.dense is not None:
            if not self.by_device:
                seen = two_minutes(normalised, self.num_boundary)[..., : self.num_boundary + 2 * self.num_states]
            output = output + self.dense(seen)
        return output, base, unit

    def _seen(self, normalised: Tensor) -> Tensor:
        """What tokens are made of: the values [B, T, V], or [B, T', V, n] with what they moved before."""
        if not self.by_device:
            return normalised
        unit = F.pad(self._moves(), (self.num_boundary, 0), value=1.0)
        return summaries(normalised, self.window, unit)

    def _decode(self, seen: Tensor) -> Tensor:
        """What `_seen` gave -> [B, T', Vs or D, d_token], what the projection turns into the states."""
        tokens = self.embedding(seen)
        for block in self.blocks:
            tokens = block(tokens)
        B, _, d = tokens.shape
        states = tokens.view(B, -1, self.tokens_per_minute, d)[:, :, self.first_state :]
        return self.head(self.norm(states))

    def _moves(self) -> Tensor:
        """[Vs], normalised: what a state moves in a minute, and the noise on it."""
        return (self.normalization.change.square() + self.input_noise**2).sqrt()

    def _base(self, normalised: Tensor) -> tuple[Tensor, Tensor]:
        minutes = normalised.shape[1] - self.window + 1
        states = normalised[:, -minutes:, self.num_boundary :]
        base, unit = torch.zeros_like(states), torch.ones_like(self.normalization.change)
        if self.target == "change":
            base, unit = states, self._moves()
        if self.skip is not None:
            # the minutes with a prediction and, where there is one, the minute before them
            base = self.skip(normalised[:, max(self.window - 2, 0) :])[:, -minutes:]
        return base, unit


class DenseSkip(nn.Module):
    """Linear, GELU, Linear, GELU, Linear over all values of a minute and what it knows before. Starts as zero.

    With tokens "scalar" it sees boundary(s+1), state(s) and state(s-1); with "device", what the tokens see.
    """

    def __init__(self, num_features: int, num_states: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(num_features, width)
        self.middle = nn.Linear(width, width)
        self.leave = nn.Linear(width, num_states)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, seen: Tensor) -> Tensor:
        """[B, T, features] or [B, T, V, n] -> [B, T, Vs] fp32."""
        features = seen.flatten(2).to(self.enter.weight.dtype)
        return self.leave(F.gelu(self.middle(F.gelu(self.enter(features))))).float()


class DecoderBlock(nn.Module):
    """Post-norm: x = norm(x + attention(x)), x = norm(x + feed_forward(x))."""

    def __init__(self, shape: DecoderShape, tokens_per_minute: int) -> None:
        super().__init__()
        self.num_heads, self.tokens_per_minute = shape.num_heads, tokens_per_minute
        self.qkv = nn.Linear(shape.d_model, 3 * shape.d_model)
        self.out = nn.Linear(shape.d_model, shape.d_model)
        self.attention_norm = nn.LayerNorm(shape.d_model)
        self.up = nn.Linear(shape.d_model, shape.d_ff)
        self.down = nn.Linear(shape.d_ff, shape.d_model)
        self.feed_forward_norm = nn.LayerNorm(shape.d_model)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, d] -> the same."""
        B, N, d = tokens.shape
        q, k, v = self.qkv(tokens).view(B, N, 3, self.num_heads, d // self.num_heads).unbind(2)
        attended = flash_attention(q, k, v, causal_block=self.tokens_per_minute).reshape(B, N, d)
        tokens = self.attention_norm(tokens + self.out(attended))
        return self.feed_forward_norm(tokens + self.down(F.gelu(self.up(tokens))))
