"""FluidDecoder: a Transformer whose tokens are single measurements of a gas network, minute after minute.

    x [B, T, V] -> one token a scalar, [B, T*V, d_model] -> blocks -> [B, T, Vs], the state one minute later

A token at minute s attends to every token, boundary and device, at minutes <= s (attention that is block-causal with
block V). The boundary's tokens carry the set-points of minute s+1, which are known. The network's output u becomes the
prediction in normalised units as  base + unit * u:

    target "level"    base = 0                        unit = 1
    target "change"   base = the state at minute s    unit = the size of a minute's change and of the input noise
    linear skip       base = what the ridge autoregression of trunkline.models.fluid.ridge predicts
    dense skip        u    = the decoder's output + that of a small network over all values of two minutes
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline.kernels.attention import flash_attention
from trunkline.kernels.linear_masked_mse import linear_masked_mse
from trunkline.kernels.masked_mse import masked_mse
from trunkline.models.fluid.config import DecoderShape
from trunkline.models.fluid.normalization import Normalization
from trunkline.models.fluid.ridge import RidgeAutoregression, two_minutes


class FluidDecoder(nn.Module):
    """The surrogate. Inputs and predictions are in physical units; normalisation statistics are buffers of it."""

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
        linear_skip: bool = False,
        dense_skip: int = 0,
    ) -> None:
        super().__init__()
        self.shape, self.history, self.target, self.input_noise = shape, history, target, input_noise
        self.num_boundary, self.num_states = num_boundary, num_states
        num_variables = num_boundary + num_states
        self.normalization = Normalization(num_boundary, num_states)
        self.skip = RidgeAutoregression(num_boundary, num_states) if linear_skip else None
        self.dense = DenseSkip(num_boundary, num_states, dense_skip) if dense_skip else None
        self.embedding = TokenEmbedding(shape, history, num_variables)
        self.blocks = nn.ModuleList(DecoderBlock(shape, num_variables) for _ in range(shape.num_layers))
        self.norm = nn.LayerNorm(shape.d_model)
        self.head = nn.Sequential(nn.Linear(shape.d_model, shape.d_token), nn.GELU(), nn.LayerNorm(shape.d_token))
        self.projection = Projection(shape.d_token)

    def forward(
        self, x: Tensor, target: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The next states, or, given a target, the loss.

        x       [B, T, V] fp32, physical: boundary(s+1) then state(s) for T minutes s; NaN where missing
        target  [B, T, Vs] fp32, physical: state(s+1); anything where `mask` is false
        mask    [B, T, Vs] bool: whether the target is present

        Without target: state(s+1) as predicted, [B, T, Vs] fp32, physical. With it: (sum, count) of the squared error
        in the units of the network's output, two fp32 scalars. The boundary is neither predicted nor in the loss.
        """
        normalised = self.normalization.normalize(x)
        base, unit = self._base(normalised)
        hidden = self._decode(normalised)
        if target is not None:
            wanted = (self.normalization.normalize_states(target) - base) / unit
            if self.dense is None:
                return self.projection(hidden, wanted, mask)
            return masked_mse(self.projection(hidden).float() + self.dense(normalised), wanted, mask)
        output = self.projection(hidden).float()
        if self.dense is not None:
            output = output + self.dense(normalised)
        return self.normalization.restore_states(base + unit * output)

    def _decode(self, normalised: Tensor) -> Tensor:
        """[B, T, V] -> [B, T, Vs, d_token], what the projection turns into one number a state."""
        B, T, V = normalised.shape
        tokens = self.embedding(normalised)
        for block in self.blocks:
            tokens = block(tokens)
        states = tokens.view(B, T, V, -1)[:, :, self.num_boundary :]
        return self.head(self.norm(states))

    def _base(self, normalised: Tensor) -> tuple[Tensor, Tensor]:
        states = normalised[..., self.num_boundary :]
        base, unit = torch.zeros_like(states), torch.ones_like(self.normalization.change)
        if self.target == "change":
            base = states
            unit = (self.normalization.change.square() + self.input_noise**2).sqrt()
        if self.skip is not None:
            base = self.skip(normalised)
        return base, unit


class DenseSkip(nn.Module):
    """Linear, GELU, Linear, GELU, Linear over boundary(s+1), state(s) and state(s-1). Starts as zero."""

    def __init__(self, num_boundary: int, num_states: int, width: int) -> None:
        super().__init__()
        self.num_boundary = num_boundary
        self.enter = nn.Linear(num_boundary + 2 * num_states, width)
        self.middle = nn.Linear(width, width)
        self.leave = nn.Linear(width, num_states)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, normalised: Tensor) -> Tensor:
        """[B, T, V] -> [B, T, Vs] fp32."""
        features = two_minutes(normalised, self.num_boundary).to(self.enter.weight.dtype)
        return self.leave(F.gelu(self.middle(F.gelu(self.enter(features))))).float()


class TokenEmbedding(nn.Module):
    """One token a scalar: Linear(1 -> p), GELU, LayerNorm, Linear(p -> d), plus encodings of minute and variable."""

    def __init__(self, shape: DecoderShape, history: int, num_variables: int) -> None:
        super().__init__()
        self.value = _Fp32Linear(1, shape.d_token)
        self.norm = nn.LayerNorm(shape.d_token)
        self.out = nn.Linear(shape.d_token, shape.d_model)
        self.position = Encodings(history, num_variables, shape.d_model)

    def forward(self, normalised: Tensor) -> Tensor:
        """[B, T, V] -> [B, T*V, d]."""
        features = F.gelu(self.value(normalised[..., None])).to(self.out.weight.dtype)
        return self.position(self.out(self.norm(features))).flatten(1, 2)


class _Fp32Linear(nn.Linear):
    """Reads its input in fp32 also where the rest runs in bf16: a minute's change hides in the lower bits."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


class Encodings(nn.Module):
    """Adds fixed sinusoids of the minute and of the variable (Vaswani et al., 2017).

    Their wavelengths differ, so that no two pairs of minute and variable have the same sum.
    """

    minute: Tensor
    variable: Tensor

    def __init__(self, history: int, num_variables: int, d_model: int) -> None:
        super().__init__()
        self.register_buffer("minute", sinusoids(history, d_model, 100.0), persistent=False)
        # the longest wavelength spans the variables: with longer ones, most channels would tell no two of them apart
        self.register_buffer("variable", sinusoids(num_variables, d_model, float(num_variables)), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T, V, d]."""
        return tokens + (self.minute[: tokens.shape[1], None] + self.variable).to(tokens.dtype)


def sinusoids(count: int, width: int, base: float) -> Tensor:
    """[count, width] fp32: sines in the first half, cosines in the second, wavelengths from 2 pi to 2 pi base."""
    rates = base ** (-torch.arange(width // 2, dtype=torch.float64) / max(width // 2 - 1, 1))
    angles = torch.arange(count, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


class DecoderBlock(nn.Module):
    """Post-norm: x = norm(x + attention(x)), x = norm(x + feed_forward(x))."""

    def __init__(self, shape: DecoderShape, num_variables: int) -> None:
        super().__init__()
        self.num_heads, self.num_variables = shape.num_heads, num_variables
        self.qkv = nn.Linear(shape.d_model, 3 * shape.d_model)
        self.out = nn.Linear(shape.d_model, shape.d_model)
        self.attention_norm = nn.LayerNorm(shape.d_model)
        self.up = nn.Linear(shape.d_model, shape.d_ff)
        self.down = nn.Linear(shape.d_ff, shape.d_model)
        self.feed_forward_norm = nn.LayerNorm(shape.d_model)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T*V, d] -> the same."""
        B, N, d = tokens.shape
        q, k, v = self.qkv(tokens).view(B, N, 3, self.num_heads, d // self.num_heads).unbind(2)
        attended = flash_attention(q, k, v, causal_block=self.num_variables).reshape(B, N, d)
        tokens = self.attention_norm(tokens + self.out(attended))
        return self.feed_forward_norm(tokens + self.down(F.gelu(self.up(tokens))))


class Projection(nn.Linear):
    """Linear(p -> 1), or that and the loss in one pass.

    It is a module of its own so that an engine which gathers weights module by module (ZeRO 3) has them here in both
    cases.
    """

    def __init__(self, d_token: int) -> None:
        super().__init__(d_token, 1)

    def forward(self, input: Tensor, target: Tensor | None = None, mask: Tensor | None = None) -> Any:
        """input [..., p] -> [...], or (sum, count) against target [...] where `mask` [...] is true."""
        if target is None:
            return super().forward(input).squeeze(-1)
        return linear_masked_mse(input, self.weight[0], self.bias, target, mask)
