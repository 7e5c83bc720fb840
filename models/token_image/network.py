"""JiT: a plain vision Transformer that predicts the clean image from a noisy one.

    x [B, S, S, C] -> one token a patch of p x p pixels, behind the patches of a condition -> blocks -> [B, S, S, C]

A block has one adaptive norm, which its two halves share:

    n(x) = RMSNorm(x) clamp(1 + W_s silu(c), .1, 10) + W_b silu(c)
    x = x + attention(n(x))        x = x + W_2 (silu(a) b), (a, b) = W_1 n(x)

c is the sine and cosine of the time. W_s and W_b start at 0, so that the time acts only as far as it is learned.
The condition, an image of its own, has a patch embedding and positions of its own. Its slots are always there: they are
zero and seen by nobody where there is no condition. A patch is seen if any of its pixels is valid.
Li and He, "Back to Basics: Let Denoising Generative Models Denoise" (2025), for the idea.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline.kernels.attention import flash_attention

CONDITION_GRID = 16
"""Patches along an edge of the condition."""


class JiTShape(NamedTuple):
    """Widths: patch in pixels, model, blocks, attention heads."""

    patch: int
    d_model: int
    num_layers: int
    num_heads: int


_WIDTHS = {"B": (768, 12, 12), "L": (1024, 24, 16), "H": (1280, 32, 16)}
PRESETS = {
    f"{name}/{patch}": JiTShape(patch, *widths)
    for name, widths in _WIDTHS.items() for patch in (4, 16, 32) if (name, patch) not in (("L", 4), ("H", 4))
}  # fmt: skip
"""Under the names that are in use, such as "B/4"."""


class JiT(nn.Module):
    """Predicts the clean image. Of images of `size` x `size` pixels and `channels` channels."""

    _no_split_modules: ClassVar[list[str]] = ["JiTBlock"]

    def __init__(self, shape: JiTShape, size: int, channels: int) -> None:
        super().__init__()
        self.shape, self.grid, self.channels = shape, size // shape.patch, channels
        d, values = shape.d_model, shape.patch**2 * channels
        self.patches, self.condition_patches = (nn.Linear(values, d, bias=False) for _ in range(2))
        self.rows, self.columns = (nn.Parameter(torch.empty(self.grid, d)) for _ in range(2))
        self.condition_rows, self.condition_columns = (nn.Parameter(torch.empty(CONDITION_GRID, d)) for _ in range(2))
        self.blocks = nn.ModuleList(JiTBlock(d, shape.num_heads) for _ in range(shape.num_layers))
        self.output = nn.Linear(d, values)
        self.apply(_initialize)
        for position in (self.rows, self.columns, self.condition_rows, self.condition_columns):
            nn.init.normal_(position, std=0.02)
        for module in self.modules():
            if isinstance(module, AdaptiveNorm):
                nn.init.zeros_(module.modulation.weight)

    def forward(
        self, x: Tensor, t: Tensor, valid: Tensor, condition: Tensor | None = None,
        condition_valid: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The clean image, [B, S, S, C] of x's dtype.

        x: [B, S, S, C], noisy. t: [B], the time. valid: bool [B, S, S], pixels that hold a token.
        condition, condition_valid: as x and valid, of an image that is no longer noisy; None for no condition.
        """
        batch = len(x)
        targets = self.patches(self._split(x)) + _positions(self.rows, self.columns)
        slots = CONDITION_GRID**2
        before = targets.new_zeros(batch, slots, self.shape.d_model)
        seen = torch.zeros(batch, slots, dtype=torch.bool, device=x.device)
        if condition is not None and condition_valid is not None:
            seen = self._split(condition_valid[..., None]).any(-1)
            embedded = self.condition_patches(self._split(condition))
            before = (embedded + _positions(self.condition_rows, self.condition_columns)) * seen[..., None]
        tokens = torch.cat([before, targets], 1)
        seen = torch.cat([seen, self._split(valid[..., None]).any(-1)], 1)
        time = time_features(t, self.shape.d_model)
        for block in self.blocks:
            tokens = block(tokens, time, seen)
        return self._join(self.output(tokens[:, slots:]))

    def _split(self, x: Tensor) -> Tensor:
        """[B, S, S, C] -> [B, patches, p p C], row by row."""
        p = self.shape.patch
        return x.unflatten(2, (-1, p)).unflatten(1, (-1, p)).transpose(2, 3).flatten(3).flatten(1, 2)

    def _join(self, tokens: Tensor) -> Tensor:
        p = self.shape.patch
        return tokens.view(-1, self.grid, self.grid, p, p, self.channels).transpose(2, 3).flatten(3, 4).flatten(1, 2)


class JiTBlock(nn.Module):
    """Attention and SwiGLU, each after the same adaptive norm."""

    def __init__(self, d: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = AdaptiveNorm(d)
        self.qkv, self.projection = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 8 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor, time: Tensor, seen: Tensor) -> Tensor:
        """[B, N, d]; time [B, d]; seen bool [B, N], the tokens that others attend to."""
        q, k, v = self.qkv(self.norm(x, time)).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        x = x + self.projection(flash_attention(q, k, v, key_mask=seen).flatten(2))
        gate, up = self.up(self.norm(x, time)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class AdaptiveNorm(nn.Module):
    """RMSNorm whose result is scaled and shifted by the time; it starts as plain RMSNorm."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm, self.modulation = nn.RMSNorm(d, eps=1e-6), nn.Linear(d, 2 * d)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """[B, N, d] of x [B, N, d] and time [B, d]."""
        scale, shift = self.modulation(F.silu(time)).to(x.dtype)[:, None].chunk(2, -1)
        return self.norm(x) * (1 + scale).clamp(0.1, 10) + shift


def time_features(t: Tensor, d: int) -> Tensor:
    """fp32 [B, d]: the sines, then the cosines of t [B] at d/2 frequencies from 1 down to 1/10000."""
    half = d // 2
    frequencies = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)


def _positions(rows: Tensor, columns: Tensor) -> Tensor:
    return (rows[:, None] + columns).flatten(0, 1)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
