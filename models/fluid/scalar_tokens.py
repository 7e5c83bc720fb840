"""Tokens that are single measurements: what a FluidDecoder reads and writes where model.tokens is "scalar".

TokenEmbedding   one token a scalar: [B, T, V] -> [B, T*V, d]
Projection       one number a token, or that and the loss in one pass
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline.kernels.linear_masked_mse import linear_masked_mse
from trunkline.models.fluid.config import DecoderShape


class TokenEmbedding(nn.Module):
    """One token a scalar: Linear(1 -> p), GELU, LayerNorm, Linear(p -> d), plus encodings of minute and variable."""

    def __init__(self, shape: DecoderShape, history: int, num_variables: int) -> None:
        super().__init__()
        self.value = Fp32Linear(1, shape.d_token)
        self.norm = nn.LayerNorm(shape.d_token)
        self.out = nn.Linear(shape.d_token, shape.d_model)
        self.position = Encodings(history, num_variables, shape.d_model)

    def forward(self, normalised: Tensor) -> Tensor:
        """[B, T, V] -> [B, T*V, d]."""
        features = F.gelu(self.value(normalised[..., None])).to(self.out.weight.dtype)
        return self.position(self.out(self.norm(features))).flatten(1, 2)


class Fp32Linear(nn.Linear):
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


class Projection(nn.Linear):
    """Linear(p -> 1), or that and the loss in one pass.

    It is a module of its own so that an engine which gathers weights module by module (ZeRO 3) has them here in both
    cases.
    """

    def __init__(self, d_token: int) -> None:
        super().__init__(d_token, 1)

    def forward(self, input: Tensor, target: Tensor | None = None, mask: Tensor | None = None) -> Any:
        """input [..., p] -> [...], or (sum, count) against target [...] with the weights `mask` [...]."""
        if target is None:
            return super().forward(input).squeeze(-1)
        return linear_masked_mse(input, self.weight[0], self.bias, target, mask)
