"""JiT: a plain vision Transformer that predicts the clean image from a noisy one.

    x [B, S, S, C] -> one token a patch of p x q pixels, behind the patches of a condition -> blocks -> [B, S, S, D]

A block of kind "shared_norm" has one adaptive norm, which its two halves share:

    n(x) = RMSNorm(x) clamp(1 + W_s silu(c), .1, 10) + W_b silu(c)
    x = x + attention(n(x))        x = x + W_2 (silu(a) b), (a, b) = W_1 n(x)

c is the sine and cosine of the time. W_s and W_b start at 0, so that the time acts only as far as it is learned.
A block of kind "official" is that of Li and He: adaLN-Zero, a scale, a shift and a gate for each half, RMSNorm of
queries and keys, rotary positions, a SwiGLU of two thirds of the width. It has the parameters of theirs. Around it
their network differs, so that its counts do: a time MLP (256 -> d -> d), an embedding of classes and 32 tokens of it,
a patch embedding through 128 or 256 numbers, fixed positions, and a modulated norm before the output.
The condition, an image of its own, has a patch embedding and positions of its own. Its places are always there: they
are zero and seen by nobody where there is no condition. A patch is seen if any of its pixels is valid.
Li and He, "Back to Basics: Let Denoising Generative Models Denoise" (2025).
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline.kernels.attention import flash_attention

CONDITION_GRID = 16
"""Patches along an edge of the condition."""
Block = Literal["shared_norm", "official"]


class JiTShape(NamedTuple):
    """Widths: patch in pixels (rows and columns), model, blocks, attention heads."""

    patch: tuple[int, int]
    d_model: int
    num_layers: int
    num_heads: int


_WIDTHS = {"B": (768, 12, 12), "L": (1024, 24, 16), "H": (1280, 32, 16)}
PRESETS = {
    f"{name}/{patch}": JiTShape((patch, patch), *widths)
    for name, widths in _WIDTHS.items() for patch in (4, 16, 32) if (name, patch) not in (("L", 4), ("H", 4))
}  # fmt: skip
"""Under the names that are in use, such as "B/4"."""


class JiT(nn.Module):
    """Of images of `size` x `size` pixels with `channels` numbers, predicts `values` numbers for each pixel.

    block: see the top of this file
    stem: neighbours of a patch in the order of the text that it is mixed with before the blocks, odd; 0 for none
    wide_output: whether what comes out is fp32 in low precision too
    condition: whether there are places for one, of 16 x 16 patches at most
    """

    _no_split_modules: ClassVar[list[str]] = ["SharedNormBlock", "OfficialBlock"]

    def __init__(
        self, shape: JiTShape, size: int, channels: int, values: int | None = None, *, block: Block = "shared_norm",
        stem: int = 0, condition: bool = True, wide_output: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        d, self.patch = shape.d_model, shape.patch
        self.grid, pixels = (size // self.patch[0], size // self.patch[1]), math.prod(self.patch)
        values = channels if values is None else values
        self.d_model, self.values, self.slots = d, values, CONDITION_GRID**2 if condition else 0
        self.patches = nn.Linear(pixels * channels, d, bias=False)
        self.rows, self.columns = (nn.Parameter(torch.empty(edge, d)) for edge in self.grid)
        positions = [self.rows, self.columns]
        if condition:
            self.condition_patches = nn.Linear(pixels * channels, d, bias=False)
            self.condition_rows, self.condition_columns = (
                nn.Parameter(torch.empty(CONDITION_GRID, d)) for _ in range(2)
            )
            positions += [self.condition_rows, self.condition_columns]
        self.stem = nn.Conv1d(d, d, stem, padding=stem // 2) if stem else None
        if block == "official":
            places = _places(self.grid, self.patch[0] == 1, self.slots)
            self.blocks = nn.ModuleList(OfficialBlock(d, shape.num_heads, places) for _ in range(shape.num_layers))
        else:
            self.blocks = nn.ModuleList(SharedNormBlock(d, shape.num_heads) for _ in range(shape.num_layers))
        self.output = (_WideLinear if wide_output else nn.Linear)(d, pixels * values)
        self.apply(_initialize_officially if block == "official" else _initialize)
        if block == "official":
            nn.init.zeros_(self.output.weight)
        for position in positions:
            nn.init.normal_(position, std=0.02)
        for module in self.modules():
            if isinstance(module, AdaptiveNorm | Modulation):
                module.start()

    def forward(
        self, x: Tensor, t: Tensor, valid: Tensor, condition: Tensor | None = None,
        condition_valid: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """[B, S, S, values], of the dtype of linear layers, or fp32 with a wide output.

        x: [B, S, S, C], noisy. t: [B], the time. valid: bool [B, S, S], pixels that hold a token.
        condition, condition_valid: as x and valid, of an image that is no longer noisy; None for no condition.
        """
        dtype = self.patches.weight.dtype  # a backend may have narrowed it
        targets = self.patches(self._split(x).to(dtype)) + _positions(self.rows, self.columns)
        seen = self._split(valid[..., None]).any(-1)
        if self.stem is not None:
            targets = targets + self.stem((targets * seen[..., None]).transpose(1, 2)).transpose(1, 2)
        if self.slots:
            given, shown = self._split(x)[:, :0], seen[:, :0]
            if condition is not None and condition_valid is not None:
                given, shown = self._split(condition), self._split(condition_valid[..., None]).any(-1)
            # none is embedded too: its parameters have a gradient then, so that each layout treats them alike
            positions = _positions(self.condition_rows[: self.grid[0]], self.condition_columns[: self.grid[1]])
            before = self.condition_patches(given.to(dtype)) + positions[: given.shape[1]]
            before = before * shown[..., None]
            free = self.slots - before.shape[1]
            before, shown = F.pad(before, (0, 0, 0, free)), F.pad(shown, (0, free))
            targets, seen = torch.cat([before, targets], 1), torch.cat([shown, seen], 1)
        time = time_features(t, self.d_model).to(dtype)
        for block in self.blocks:
            targets = block(targets, time, seen)
        return self._join(self.output(targets[:, self.slots :]))

    def _split(self, x: Tensor) -> Tensor:
        """[B, S, S, C] -> [B, patches, p q C], row by row."""
        p, q = self.patch
        return x.unflatten(2, (-1, q)).unflatten(1, (-1, p)).transpose(2, 3).flatten(3).flatten(1, 2)

    def _join(self, tokens: Tensor) -> Tensor:
        (rows, columns), (p, q) = self.grid, self.patch
        there = tokens.view(-1, rows, columns, p, q, self.values)
        return there.transpose(2, 3).reshape(-1, rows * p, columns * q, self.values)


class _WideLinear(nn.Linear):
    """Makes pixels in fp32 in low precision too: bf16 rounds by .002 near 1, and digits of base 256 are .004 apart."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class SharedNormBlock(nn.Module):
    """Attention and SwiGLU, each after the same adaptive norm."""

    def __init__(self, d: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = AdaptiveNorm(d)
        self.qkv, self.projection = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 8 * d), nn.Linear(4 * d, d)

    def forward(self, x: Tensor, time: Tensor, seen: Tensor) -> Tensor:
        """[B, N, d]; time [B, d]; seen bool [B, N], the tokens that others attend to."""
        modulation = self.norm.modulated(time)
        q, k, v = self.qkv(self.norm(x, *modulation)).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        x = x + self.projection(flash_attention(q, k, v, key_mask=seen).flatten(2))
        gate, up = self.up(self.norm(x, *modulation)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class OfficialBlock(nn.Module):
    """Attention and SwiGLU, each after a norm that the time modulates, and behind a gate.

    places: fp32 [N, A], where each token lies along A axes, for rotary positions. They turn the pairs (i, i + D/2) of a
        head's D numbers, where Li and He take neighbours: the same up to the order of qkv's rows
    """

    def __init__(self, d: int, num_heads: int, places: Tensor) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.modulation = Modulation(d)
        self.norm1, self.norm2 = (nn.RMSNorm(d, eps=1e-6) for _ in range(2))
        self.qkv, self.projection = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.q_norm, self.k_norm = (nn.RMSNorm(d // num_heads, eps=1e-6) for _ in range(2))
        hidden = swiglu_width(d)
        self.up, self.down = nn.Linear(d, 2 * hidden), nn.Linear(hidden, d)
        self.angles: Tensor
        self.register_buffer("angles", _angles(places, d // num_heads), persistent=False)

    def forward(self, x: Tensor, time: Tensor, seen: Tensor) -> Tensor:
        """[B, N, d]; time [B, d]; seen bool [B, N], the tokens that others attend to."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(time, x.dtype)
        q, k, v = self.qkv(self.norm1(x) * (1 + scale1) + shift1).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = (_rotated(norm(each), self.angles) for norm, each in ((self.q_norm, q), (self.k_norm, k)))
        x = x + gate1 * self.projection(flash_attention(q, k, v, key_mask=seen).flatten(2))
        gate, up = self.up(self.norm2(x) * (1 + scale2) + shift2).chunk(2, -1)
        return x + gate2 * self.down(F.silu(gate) * up)


def swiglu_width(d: int) -> int:
    """Of a block of kind "official": two thirds of 4 d."""
    return 8 * d // 3


class Modulation(nn.Module):
    """Shift, scale and gate of two halves, [B, 1, d] each, from the time; all start at 0."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d, 6 * d)

    def start(self) -> None:
        nn.init.zeros_(self.linear.weight)

    def forward(self, time: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return self.linear(F.silu(time)).to(dtype)[:, None].chunk(6, -1)


class AdaptiveNorm(nn.Module):
    """RMSNorm whose result is scaled and shifted by the time; it starts as plain RMSNorm."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm, self.modulation = nn.RMSNorm(d, eps=1e-6), nn.Linear(d, 2 * d)

    def start(self) -> None:
        nn.init.zeros_(self.modulation.weight)

    def modulated(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift, fp32 [B, 1, d] each, of time [B, d]."""
        scale, shift = self.modulation(F.silu(time)).float()[:, None].chunk(2, -1)
        return (1 + scale).clamp(0.1, 10), shift

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """[B, N, d] of x [B, N, d]."""
        return (self.norm(x) * scale + shift).to(x.dtype)


def time_features(t: Tensor, d: int) -> Tensor:
    """fp32 [B, d]: the sines, then the cosines of t [B] at d/2 frequencies from 1 down to 1/10000."""
    half = d // 2
    frequencies = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=t.device))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1)


def _positions(rows: Tensor, columns: Tensor) -> Tensor:
    return (rows[:, None] + columns).flatten(0, 1)


def _places(grid: tuple[int, int], in_text: bool, slots: int) -> Tensor:
    """Where patches lie, fp32: [N, 1] along the text, or [N, 2] on the grid. The condition's lie before them."""
    if in_text:
        return torch.arange(-slots, math.prod(grid), dtype=torch.float32)[:, None]
    rows, columns = (torch.arange(edge, dtype=torch.float32) for edge in grid)
    slot = torch.arange(slots)  # the condition's patches fill them row by row
    before = torch.stack([slot // grid[1] - CONDITION_GRID, slot % grid[1]], 1).float()
    return torch.cat([before, torch.cartesian_prod(rows, columns)])


def _angles(places: Tensor, head_dim: int) -> Tensor:
    """fp32 [N, head_dim / 2]: the angle of each pair of numbers, an equal part of them for each axis."""
    each = head_dim // 2 // places.shape[1]
    frequencies = 10000.0 ** (-torch.arange(each, dtype=torch.float32) / each)
    return (places[..., None] * frequencies).flatten(1)


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """[B, N, H, D] with its pairs (x_i, x_(i + D/2)) turned by angles [N, D/2]."""
    cosine, sine = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], -1)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _initialize_officially(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv1d):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
