"""RelativeAttention: the Triton kernels of relative_attention, with their gradient.

Autograd saves the inputs, the output and one fp32 number a query and head. The gradient of the bias takes, for the
length of the backward pass, B H N (N + M) / n fp32 numbers, with n the queries of dQ's tile: 64 on Hopper for heads of
up to 64 channels. There they are at 512 tokens an eighth of the bytes of query, key, value and output, at 4,096 as many
(bf16, D = 64). Elsewhere n is 32, or 16.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.kernels.attention.forward import addressable
from trunkline.kernels.attention.relative_kernels import (
    MARGIN,
    _relative_bwd_dkdv_kernel,
    _relative_bwd_dq_kernel,
    _relative_fwd_kernel,
)
from trunkline.kernels.attention.tiles import Tile, architecture_of
from trunkline.kernels.first_order import no_second_order
from trunkline.kernels.operators import Operator
from trunkline.kernels.triton_path import available, triton

_SMALL, _LARGE, _OF_FLOAT32 = Tile(32, 32, 4, 2), Tile(64, 64, 4, 2), Tile(32, 32, 8, 1)
TILES = {
    (90, 16): {
        16: (_LARGE, _LARGE, _LARGE),
        32: (_LARGE, _LARGE, _LARGE),
        64: (Tile(64, 32, 4, 2), _LARGE, _LARGE),
        128: (_LARGE, _SMALL, _SMALL),
    },
    (80, 16): {
        16: (_LARGE, _LARGE, _LARGE),
        32: (_LARGE, _LARGE, _LARGE),
        64: (Tile(64, 32, 4, 2), Tile(32, 64, 4, 2), Tile(64, 32, 4, 2)),
        128: (_LARGE, _SMALL, _SMALL),
    },
    (80, 32): {
        16: (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        32: (_OF_FLOAT32, _OF_FLOAT32, _OF_FLOAT32),
        64: (_OF_FLOAT32, _OF_FLOAT32, _OF_FLOAT32),
        128: (_OF_FLOAT32, Tile(16, 16, 8, 1), _OF_FLOAT32),
    },
}
"""(architecture, bits of an element) -> head dimension, as a power of two -> tile of forward, of dQ, of dK and dV.

Chosen by their machine code alone, with `python -m trunkline.benchmarks.compile_gate_relative`: none was timed yet.
An architecture without an entry uses that of 80. No tile of dQ has more queries than keys.
"""


def takes(q: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels compute for q, products in `dtype`: not on GPUs before compute capability 8.0."""
    if not available(q) or dtype == torch.float64 or q.shape[-1] % 8 or q.shape[-1] > 128:
        return False
    return not (q.is_cuda and torch.cuda.is_available()) or torch.cuda.get_device_capability(q.device) >= (8, 0)


def choose_tiles(architecture: int, bits: int, head_dim: int) -> tuple[Tile, Tile, Tile]:
    return TILES.get((architecture, bits), TILES[80, bits])[padded(head_dim)]


def padded(head_dim: int) -> int:
    """As the kernels have it: products of tiles take powers of two, from 16 on."""
    return max(16, triton.next_power_of_2(head_dim))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, query_document: Tensor, key_document: Tensor, causal: bool,
    scale: float, dropout: float, seed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, N, H, _ = q.shape
    tile = _tiles(q)[0]
    arguments = _arguments(q, k, v, bias, query_document, key_document, causal, scale, dropout, seed)
    out, lse = _outputs(q)
    with torch.cuda.device_of(q):  # Triton launches on the current one
        _relative_fwd_kernel[(triton.cdiv(N, tile.block_m) * B * H,)](out=out, lse=lse, **arguments, **_options(tile))
    return out, lse


def _outputs(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, query_document: Tensor, key_document: Tensor,
    out: Tensor, lse: Tensor, causal: bool, scale: float, dropout: float, seed: int, bias_learns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (B, N, H, _), M = q.shape, k.shape[1]
    _, dq_tile, tile = _tiles(q)
    programs = triton.cdiv(N, dq_tile.block_m) * B
    d_out, delta = addressable(d_out), torch.empty_like(lse)
    dq, dk, dv, d_bias = _gradients(d_out, q, k, v, bias, bias_learns)
    diagonals = lse.new_zeros((programs, H, N + M - 1) if bias_learns else 0)
    arguments = _arguments(q, k, v, bias, query_document, key_document, causal, scale, dropout, seed)
    arguments |= {"d_out": d_out, "lse": lse, "delta": delta} | _strides("do", "n", d_out)
    with torch.cuda.device_of(q):
        _relative_bwd_dq_kernel[(programs * H,)](
            out=out, dq=dq, diagonals=diagonals, BIAS_LEARNS=bias_learns, **arguments, **_options(dq_tile)
        )
        _relative_bwd_dkdv_kernel[(triton.cdiv(M, tile.block_n) * B * H,)](dk=dk, dv=dv, **arguments, **_options(tile))
    if bias_learns:
        d_bias.copy_(diagonals.sum(0))
    return dq, dk, dv, d_bias


def _gradients(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, q.new_empty(0) if bias is None or not rest[-1] else bias.new_empty(bias.shape)


def _tiles(q: Tensor) -> tuple[Tile, Tile, Tile]:
    return choose_tiles(architecture_of(q.device), 8 * q.element_size(), q.shape[-1])


def _options(tile: Tile) -> dict[str, int]:
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n} | tile.options()


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, query_document: Tensor, key_document: Tensor, causal: bool,
    scale: float, dropout: float, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Those that all three kernels take."""
    q, k, v = (addressable(x) for x in (q, k, v))
    return {
        "q": q, "k": k, "v": v, "bias": q if bias is None else F.pad(bias.float(), (MARGIN, MARGIN)),
        "query_document": query_document.contiguous(), "key_document": key_document.contiguous(),
        "N": q.shape[1], "M": k.shape[1], "H": q.shape[2], "scale": scale,
        "seed_low": seed % 2**31, "seed_high": seed >> 31,
        "least_kept": int(dropout * 2**32) - 2**31, "rescale": 1 / (1 - dropout),
        "D": q.shape[3], "BLOCK_D": padded(q.shape[3]),
        "CAUSAL": causal, "HAS_BIAS": bias is not None, "DROPS": dropout > 0,
    } | _strides("q", "n", q) | _strides("k", "m", k) | _strides("v", "m", v)  # fmt: skip


def _strides(name: str, place: str, x: Tensor) -> dict[str, int]:
    return {f"{name}_stride_{axis}": stride for axis, stride in zip(("b", place, "h"), x.stride()[:3], strict=True)}


forward = Operator("relative_attention", _forward, _outputs)
"""(out, lse) of checked arguments."""
backward = Operator("relative_attention_backward", _backward, _gradients)
"""(dq, dk, dv, d_bias) from what `forward` took and gave; d_bias is empty where it is not needed."""


class RelativeAttention(torch.autograd.Function):
    """apply(q, k, v, bias, query_document, key_document, causal, scale, dropout, seed)[0] is the output."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = forward(*arguments)
        link = out.new_empty(())
        ctx.save_for_backward(link, *arguments[:6], out, lse)
        ctx.how = arguments[6:]
        return out, link

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        link, *saved = ctx.saved_tensors
        needs_bias = ctx.needs_input_grad[3]
        dq, dk, dv, d_bias = backward(d_out, *saved, *ctx.how, needs_bias)
        gradients = no_second_order("relative_attention", link, d_out, dq, dk, dv, d_bias if needs_bias else None)
        return *gradients, *(None,) * 6
