# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of Triton's functions are pointers, tiles and integers, which have no Python types)
"""launch_forward: the Triton kernel of flash_attention's forward pass.

A program holds one tile of queries and walks over the key tiles that any of them sees, with the running maximum m and
sum l of each row (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao, "FlashAttention-2",
2023). Key tiles that every query of the tile sees whole come first and are worked without mask arithmetic; the tiles on
the boundary of a causal block, at the end of the keys or with some padding come after; tiles of nothing but padding are
not visited. Scores are in units of log2, so that exponentials are exp2 with the softmax scale folded into one
multiply-add, and so is the log-sum-exp of each row that the backward pass reads: fp32 [B, Hq, N], +inf for a row that
sees no key. Dtype: products of tiles in the input dtype with fp32 accumulators (fp32 inputs: IEEE fp32), P rounded to
the dtype of V, the rest fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trunkline.kernels.attention.key_tiles import nth_tile, sort_key_tiles, tiles_to_visit
from trunkline.kernels.attention.tiles import Tile, choose_tile
from trunkline.kernels.triton_path import INTERPRETED, jit, tl, triton


@jit
def _flash_fwd_kernel(
    q, k, v, out, lse, key_mask, key_tiles,
    q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_m, k_stride_h, v_stride_b, v_stride_m, v_stride_h,
    B, N, M, Hq, group, causal_block, scale_log2, heads_at_once,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    tile, head = tile_and_head(tl.cdiv(N, BLOCK_M), B * Hq, heads_at_once)
    tile = tl.cdiv(N, BLOCK_M) - 1 - tile  # the last queries see the most keys: they start first
    b, h = (head // Hq).to(tl.int64), (head % Hq).to(tl.int64)
    k += b * k_stride_b + h // group * k_stride_h
    v += b * v_stride_b + h // group * v_stride_h
    first_row = tile * BLOCK_M
    in_tile = tl.arange(0, BLOCK_M)
    rows = first_row + in_tile
    q_tile = load_rows(q + b * q_stride_b + h * q_stride_h, first_row, in_tile, q_stride_n, rows < N, D, BLOCK_D, True)
    row_end, seen_by_all, seen_by_any = visible_keys(first_row, rows, N, M, causal_block, CAUSAL)
    key_mask += b * M
    key_tiles += b * 3 * (tl.cdiv(M, BLOCK_N) + 1)
    whole, total, gap_at, gap = tiles_to_visit(key_tiles, seen_by_all, seen_by_any, M, BLOCK_N, HAS_MASK)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc, m, l = _attend_to_tiles(  # noqa: E741
        acc, m, l, q_tile, k, v, k_stride_m, v_stride_m, key_mask, key_tiles, 0, whole, gap_at, gap, row_end, M,
        scale_log2, D, BLOCK_D, BLOCK_N, HAS_MASK, False,
    )  # fmt: skip
    acc, m, l = _attend_to_tiles(  # noqa: E741
        acc, m, l, q_tile, k, v, k_stride_m, v_stride_m, key_mask, key_tiles, whole, total, gap_at, gap, row_end, M,
        scale_log2, D, BLOCK_D, BLOCK_N, HAS_MASK, True,
    )  # fmt: skip

    sees_none = l == 0
    acc = acc / tl.where(sees_none, 1.0, l)[:, None]
    tl.store(lse + head.to(tl.int64) * N + rows, tl.where(sees_none, float("inf"), m + tl.log2(l)), mask=rows < N)
    store_rows(out + (b * N * Hq + h) * D, first_row, in_tile, Hq * D, acc, rows < N, D, BLOCK_D)


@jit
def _attend_to_tiles(
    acc, m, l, q_tile, k, v, k_stride_m, v_stride_m, key_mask, key_tiles, first, last, gap_at, gap, row_end, M,  # noqa: E741
    scale_log2, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    next_tile = nth_tile(key_tiles, first, gap_at, gap, HAS_MASK)
    for i in range(first, last):
        first_key = next_tile * BLOCK_N
        # a tile ahead: loaded where it is used, it would take one of the software pipeline's stages
        next_tile = nth_tile(key_tiles, i + 1, gap_at, gap, HAS_MASK)
        in_tile = tl.arange(0, BLOCK_N)
        keys = first_key + in_tile
        real = real_keys(key_mask, keys, M, HAS_MASK, MASKED)
        k_tile = load_rows(k, first_key, in_tile, k_stride_m, real, D, BLOCK_D, MASKED)
        v_tile = load_rows(v, first_key, in_tile, v_stride_m, real, D, BLOCK_D, MASKED)
        s = dot(q_tile, tl.trans(k_tile), None)
        if MASKED:
            s = tl.where(tl.where(real, keys, M)[None, :] < row_end[:, None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
        # a row that has seen no key yet: -inf - -inf would be NaN
        base = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
        p = tl.exp2(s * scale_log2 - base[:, None])
        shrink = tl.exp2(m - base)
        l = l * shrink + tl.sum(p, 1)  # noqa: E741
        acc = dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None])
        m = m_new
    return acc, m, l


_INTERPRETED = None if tl is None else tl.constexpr(INTERPRETED)


@jit
def dot(a, b, acc):
    """a @ b + acc in fp32."""
    if _INTERPRETED:  # which takes bf16 operands for integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@jit
def tile_and_head(num_tiles, num_heads, heads_at_once):
    """Which tile of which head a program works on: few heads at a time, so that what they share stays in the cache."""
    pid = tl.program_id(0)
    first_head = pid // (num_tiles * heads_at_once) * heads_at_once
    among = tl.minimum(heads_at_once, num_heads - first_head)
    rest = pid - first_head * num_tiles
    return rest // among, first_head + rest % among


@jit
def visible_keys(first_row, rows, N, M, causal_block, CAUSAL: tl.constexpr):
    """Where the keys end that each row sees, that all rows of the tile see, that any of them sees."""
    if CAUSAL:
        row_end = tl.minimum((rows // causal_block + 1) * causal_block, M)
        last_row = tl.minimum(first_row + rows.shape[0], N) - 1
        seen_by_all = tl.minimum((first_row // causal_block + 1) * causal_block, M)
        seen_by_any = tl.minimum((last_row // causal_block + 1) * causal_block, M)
        return row_end, seen_by_all, seen_by_any
    else:
        # M for every row; written as a constant, it costs sm_90 the registers that two programs side by side have
        return tl.minimum(rows + M, M), M, M


@jit
def real_keys(key_mask, keys, M, HAS_MASK: tl.constexpr, MASKED: tl.constexpr):
    """Which keys exist and are no padding; only asked for in MASKED tiles."""
    real = keys < M
    if MASKED and HAS_MASK:
        real = tl.load(key_mask + keys, mask=real, other=0) != 0
    return real


@jit
def load_rows(base, first, rows, stride, real, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECKED: tl.constexpr):
    """[rows, BLOCK_D] from row `first` on; 0 past column D and, if CHECKED, wherever a row is not real.

    `addressable` has seen to it that each row starts at a multiple of 16 bytes. The compiler, which only knows what 16
    divides, is told so: or with D = 72, say, it would load one value at a time.
    """
    columns = tl.arange(0, BLOCK_D)
    per_16_bytes: tl.constexpr = 128 // base.dtype.element_ty.primitive_bitwidth
    start = tl.multiple_of(base + tl.cast(first, tl.int64) * stride, 16)
    pointers = start + (tl.multiple_of(rows[:, None] * stride, (per_16_bytes, per_16_bytes)) + columns[None, :])
    if D < BLOCK_D:
        if CHECKED:
            return tl.load(pointers, mask=real[:, None] & (columns < D)[None, :], other=0.0)
        else:
            return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    elif CHECKED:
        return tl.load(pointers, mask=real[:, None], other=0.0)
    else:
        return tl.load(pointers)


@jit
def store_rows(base, first, rows, stride, values, real, D: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    pointers = base + first.to(tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    tl.store(pointers, values.to(base.dtype.element_ty), mask=real[:, None] & (columns < D)[None, :])


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    causal_block: int | None,
    softmax_scale: float,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of checked arguments with at least one query and one key, D a multiple of 8.

    `tile` stands in for the table's.
    """
    B, N, Hq, D = q.shape
    M, Hkv = k.shape[1:3]
    block_d = triton.next_power_of_2(D)
    tile = tile or choose_tile("forward", q, block_d)
    q, k, v = (addressable(x) for x in (q, k, v))
    out = q.new_empty(q.shape)
    lse = torch.empty(B, Hq, N, dtype=torch.float32, device=q.device)
    mask, key_tiles = mask_and_tiles(key_mask, tile.block_n, q)
    causal_block = binding_causal_block(causal_block, N, M)
    group = Hq // Hkv
    with torch.cuda.device_of(q):  # Triton launches on the current one
        _flash_fwd_kernel[(triton.cdiv(N, tile.block_m) * B * Hq,)](
            q, k, v, out, lse, mask, key_tiles, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            B, N, M, Hq, group, causal_block or 0, softmax_scale * math.log2(math.e),
            group * heads_in_l2(2 * M * D * k.element_size(), B * Hkv),
            D=D, BLOCK_D=block_d, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            CAUSAL=causal_block is not None, HAS_MASK=key_mask is not None,
            **tile.options(),
        )  # fmt: skip
    return out, lse


def mask_and_tiles(key_mask: Tensor | None, block_n: int | None, unused: Tensor) -> tuple[Tensor, Tensor]:
    """What a kernel reads of the key mask; where it reads nothing it gets any pointer."""
    if key_mask is None:
        return unused, unused
    mask = key_mask.contiguous().view(torch.uint8)
    return mask, unused if block_n is None else sort_key_tiles(mask, block_n)


def binding_causal_block(causal_block: int | None, num_queries: int, num_keys: int) -> int | None:
    """None for a block that holds the whole sequence: then every query sees every key."""
    return None if causal_block is None or causal_block >= max(num_queries, num_keys) else causal_block


def heads_in_l2(bytes_per_head: int, num_heads: int) -> int:
    """How many of a batch's heads to work on at a time: what they share should fit in half of a 50 MB L2 cache."""
    return min(max(1, 25_000_000 // bytes_per_head), num_heads)


def addressable(x: Tensor) -> Tensor:
    """x as the kernels want it: each row in one piece from a multiple of 16 bytes on, which D a multiple of 8 grants to
    a copy; the rows so near that 32-bit offsets span a tile."""
    starts = x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1])
    fits = x.stride(-1) == 1 and x.stride(1) < 2**22 and not any(start % 16 for start in starts)
    return x if fits else x.clone(memory_format=torch.contiguous_format)
