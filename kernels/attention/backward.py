# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of Triton's functions are pointers, tiles and integers, which have no Python types)
"""launch_backward: the Triton kernels of flash_attention's backward pass.

    P = exp(S - lse),  dV = P^T dO,  dS = P * (dO V^T - delta),  dQ = s dS K,  dK = s dS^T Q,  delta = rowsum(dO * O)

One pass by default: a program holds a key tile with its dK and dV in registers, walks over the query tiles that see
it, and adds its share of dQ into an fp32 accumulator by atomics, of whole tiles on Hopper: 5 products of tiles and one
exponential a pair, in an order of additions that varies from run to run. With
`torch.use_deterministic_algorithms(True)` a second kernel, which holds a query tile and walks over keys as the forward
pass does, makes dQ instead: the same bits in every run for 7 products and 2 exponentials. One program sums dK and dV
over the query heads that share a key head. Where hopper.py says so, backward_hopper.py makes the one pass.

S and P are held transposed, [keys, queries], so that dV and dK take their left operand from registers. Dtype: as in the
forward pass; P and dS are rounded to the input dtype, sums stay fp32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from trunkline.kernels.attention.forward import (
    addressable,
    binding_causal_block,
    dot,
    heads_in_l2,
    load_rows,
    mask_and_tiles,
    real_keys,
    store_rows,
    tile_and_head,
    visible_keys,
)
from trunkline.kernels.attention.key_tiles import nth_tile, tiles_to_visit
from trunkline.kernels.attention.tiles import Tile, architecture_of, choose_tile
from trunkline.kernels.triton_path import jit, tl, triton


@jit
def _flash_bwd_delta_kernel(
    out, d_out, lse, row_sums, o_stride_b, o_stride_n, o_stride_h, do_stride_b, do_stride_n, do_stride_h,
    N, padded_N, Hq, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, SUMS_TILE: tl.constexpr,
):  # fmt: skip
    num_tiles = tl.cdiv(padded_N, BLOCK_M)
    tile, head = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    b, h = (head // Hq).to(tl.int64), (head % Hq).to(tl.int64)
    first_row = tile * BLOCK_M
    in_tile = tl.arange(0, BLOCK_M)
    rows = first_row + in_tile
    row_lse = tl.load(lse + head.to(tl.int64) * N + rows, mask=rows < N, other=0.0)
    sees_any = (rows < N) & (row_lse < float("inf"))
    o = load_rows(out + b * o_stride_b + h * o_stride_h, first_row, in_tile, o_stride_n, sees_any, D, BLOCK_D, True)
    do = load_rows(
        d_out + b * do_stride_b + h * do_stride_h, first_row, in_tile, do_stride_n, sees_any, D, BLOCK_D, True
    )
    row_sums += 2 * head.to(tl.int64) * padded_N + place_of(rows, SUMS_TILE)
    tl.store(row_sums, row_lse, mask=rows < padded_N)
    tl.store(row_sums + SUMS_TILE, tl.sum(o.to(tl.float32) * do.to(tl.float32), 1), mask=rows < padded_N)


@jit
def place_of(rows, SUMS_TILE: tl.constexpr):
    """Where row_sums holds the lse of a head's rows: tile by tile, each followed by its delta."""
    return rows // SUMS_TILE * (2 * SUMS_TILE) + rows % SUMS_TILE


@jit
def _flash_bwd_kernel(
    q, k, v, d_out, row_sums, dq_sum, dk, dv, key_mask,
    q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_m, k_stride_h, v_stride_b, v_stride_m, v_stride_h,
    do_stride_b, do_stride_n, do_stride_h,
    B, N, padded_N, M, Hkv, group, causal_block, scale, scale_log2, heads_at_once,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, GROUPED: tl.constexpr, ADD_DQ: tl.constexpr,
    DQ_IN_TILES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    # the first keys are seen by the most queries: they start first
    tile, head = tile_and_head(tl.cdiv(M, BLOCK_N), B * Hkv, heads_at_once)
    b, h = (head // Hkv).to(tl.int64), (head % Hkv).to(tl.int64)
    first_key = tile * BLOCK_N
    in_tile = tl.arange(0, BLOCK_N)
    keys = first_key + in_tile
    real = real_keys(key_mask + b * M, keys, M, HAS_MASK, True)
    k_tile = load_rows(k + b * k_stride_b + h * k_stride_h, first_key, in_tile, k_stride_m, real, D, BLOCK_D, True)
    v_tile = load_rows(v + b * v_stride_b + h * v_stride_h, first_key, in_tile, v_stride_m, real, D, BLOCK_D, True)

    # Each key is seen from some row on. Rows that see none of these keys are neither visited nor read. Some query tiles
    # in the middle have all their rows, see every key and need no mask: SPLIT gives them a loop of their own.
    num_tiles = tl.cdiv(N, BLOCK_M)
    seen_from = keys // causal_block * causal_block if CAUSAL else tl.zeros_like(keys)
    seen_from = tl.where(real, seen_from, num_tiles * BLOCK_M)
    first_row = tl.minimum(tl.min(seen_from), num_tiles * BLOCK_M)
    first_tile = first_row // BLOCK_M
    unmasked_to = tl.maximum(N // BLOCK_M, first_tile)
    unmasked_from = tl.minimum(tl.cdiv(tl.max(seen_from), BLOCK_M), unmasked_to)

    dk_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    q += b * q_stride_b + h * group * q_stride_h
    d_out += b * do_stride_b + h * group * do_stride_h
    row_sums += (b * Hkv + h) * group * padded_N * 2
    if not DQ_IN_TILES:
        dq_sum += (b * Hkv + h) * group * N * D
    if SPLIT:
        dk_sum, dv_sum = _sum_over_queries(
            dk_sum, dv_sum, k_tile, v_tile, q, d_out, row_sums, dq_sum, head * group,
            q_stride_n, do_stride_n, q_stride_h, do_stride_h, unmasked_from, unmasked_to, unmasked_from, unmasked_to,
            group, first_row, seen_from, N, padded_N, scale_log2, D, BLOCK_D, BLOCK_M, GROUPED, ADD_DQ,
            DQ_IN_TILES, False, False,
        )  # fmt: skip
    dk_sum, dv_sum = _sum_over_queries(
        dk_sum, dv_sum, k_tile, v_tile, q, d_out, row_sums, dq_sum, head * group,
        q_stride_n, do_stride_n, q_stride_h, do_stride_h, first_tile, num_tiles, unmasked_from, unmasked_to,
        group, first_row, seen_from, N, padded_N, scale_log2, D, BLOCK_D, BLOCK_M, GROUPED, ADD_DQ,
        DQ_IN_TILES, True, SPLIT,
    )  # fmt: skip

    offset = (b * M * Hkv + h) * D
    store_rows(dk + offset, first_key, in_tile, Hkv * D, dk_sum * scale, keys < M, D, BLOCK_D)
    store_rows(dv + offset, first_key, in_tile, Hkv * D, dv_sum, keys < M, D, BLOCK_D)


@jit
def _sum_over_queries(
    dk_sum, dv_sum, k_tile, v_tile, q, d_out, row_sums, dq_sum, first_head,
    q_stride_n, do_stride_n, q_stride_h, do_stride_h, first, last, unmasked_from, unmasked_to,
    group, first_row, seen_from, N, padded_N, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, GROUPED: tl.constexpr, ADD_DQ: tl.constexpr,
    DQ_IN_TILES: tl.constexpr, MASKED: tl.constexpr, SKIP_UNMASKED: tl.constexpr,
):  # fmt: skip
    """dk_sum and dv_sum with the shares of the query tiles from `first` to `last`, of each head that shares the keys.

    Those from `unmasked_from` to `unmasked_to` need no mask; SKIP_UNMASKED leaves them out. seen_from [BLOCK_N] is the
    first row that sees each key. One loop for all heads: a loop around it would cost the registers that its software
    pipeline needs.
    """
    count = last - first
    if SKIP_UNMASKED:
        count -= unmasked_to - unmasked_from
        first = tl.where(first == unmasked_from, unmasked_to, first)
    query_tile, head = first, 0
    for _ in range(group * count if GROUPED else count):
        in_tile = tl.arange(0, BLOCK_M)
        rows = query_tile * BLOCK_M + in_tile
        inside = (rows >= first_row) & (rows < N)
        # in one load, of which each thread takes a part: two short ones every thread would issue whole, value by value
        sums = row_sums + 2 * (tl.cast(head, tl.int64) * padded_N + query_tile * BLOCK_M) + tl.arange(0, 2 * BLOCK_M)
        row_lse, row_delta = tl.split(tl.trans(tl.reshape(tl.load(sums), [2, BLOCK_M])))
        q_head, do_head = q + tl.cast(head, tl.int64) * q_stride_h, d_out + tl.cast(head, tl.int64) * do_stride_h
        q_tile = load_rows(q_head, query_tile * BLOCK_M, in_tile, q_stride_n, inside, D, BLOCK_D, MASKED)
        do_tile = load_rows(do_head, query_tile * BLOCK_M, in_tile, do_stride_n, inside, D, BLOCK_D, MASKED)
        s = dot(k_tile, tl.trans(q_tile), None)
        dp = dot(v_tile, tl.trans(do_tile), None)
        p = tl.exp2(s * scale_log2 - row_lse[None, :])
        if MASKED and (SKIP_UNMASKED or query_tile < unmasked_from or query_tile >= unmasked_to):
            p = tl.where(seen_from[:, None] <= rows[None, :], p, 0.0)
            row_delta = tl.where(inside, row_delta, 0.0)  # it may be NaN where a row sees none of the keys
        dv_sum = dot(p.to(do_tile.dtype), do_tile, dv_sum)
        ds = (p * (dp - row_delta[None, :])).to(q_tile.dtype)
        dk_sum = dot(ds, q_tile, dk_sum)
        if ADD_DQ:
            dq = dot(tl.trans(ds), k_tile, None)
            if DQ_IN_TILES:
                # rows that see none of the keys get zeros; nothing is written past the last row or column
                corner = [first_head + head, query_tile * BLOCK_M, 0]
                dq_sum.atomic_add(corner, tl.reshape(dq, [1, BLOCK_M, BLOCK_D]))
            else:
                dq_head = dq_sum + tl.cast(head, tl.int64) * N * D
                add_rows(dq_head, query_tile * BLOCK_M, in_tile, dq, inside, D, BLOCK_D, MASKED)
        query_tile += 1
        if SKIP_UNMASKED:
            query_tile = tl.where(query_tile == unmasked_from, unmasked_to, query_tile)
        if GROUPED:
            head += (query_tile == last).to(tl.int32)
            query_tile = tl.where(query_tile == last, first, query_tile)
    return dk_sum, dv_sum


@jit
def add_rows(base, first, rows, values, real, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECKED: tl.constexpr):
    """Add values [rows, BLOCK_D] to those from row `first` on, while other programs do the same."""
    columns = tl.arange(0, BLOCK_D)
    pointers = base + first.to(tl.int64) * D + (rows[:, None] * D + columns[None, :])
    if CHECKED:
        tl.atomic_add(pointers, values, mask=real[:, None] & (columns < D)[None, :], sem="relaxed")
    elif D < BLOCK_D:
        tl.atomic_add(pointers, values, mask=(columns < D)[None, :], sem="relaxed")
    else:
        tl.atomic_add(pointers, values, sem="relaxed")


@jit
def _flash_bwd_dq_kernel(
    q, k, v, d_out, row_sums, dq, key_mask, key_tiles,
    q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_m, k_stride_h, v_stride_b, v_stride_m, v_stride_h,
    do_stride_b, do_stride_n, do_stride_h,
    B, N, padded_N, M, Hq, group, causal_block, scale, scale_log2, heads_at_once,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, SUMS_TILE: tl.constexpr,
):  # fmt: skip
    tile, head = tile_and_head(tl.cdiv(N, BLOCK_M), B * Hq, heads_at_once)
    tile = tl.cdiv(N, BLOCK_M) - 1 - tile
    b, h = (head // Hq).to(tl.int64), (head % Hq).to(tl.int64)
    k += b * k_stride_b + h // group * k_stride_h
    v += b * v_stride_b + h // group * v_stride_h
    first_row = tile * BLOCK_M
    in_tile = tl.arange(0, BLOCK_M)
    rows = first_row + in_tile
    row_sums += 2 * head.to(tl.int64) * padded_N + place_of(rows, SUMS_TILE)
    row_lse = tl.load(row_sums, mask=rows < N, other=float("inf"))
    row_delta = tl.load(row_sums + SUMS_TILE, mask=rows < N, other=0.0)
    sees_any = row_lse < float("inf")
    q_tile = load_rows(q + b * q_stride_b + h * q_stride_h, first_row, in_tile, q_stride_n, sees_any, D, BLOCK_D, True)
    do_tile = load_rows(
        d_out + b * do_stride_b + h * do_stride_h, first_row, in_tile, do_stride_n, sees_any, D, BLOCK_D, True
    )
    row_end, seen_by_all, seen_by_any = visible_keys(first_row, rows, N, M, causal_block, CAUSAL)
    key_mask += b * M
    key_tiles += b * 3 * (tl.cdiv(M, BLOCK_N) + 1)
    whole, total, gap_at, gap = tiles_to_visit(key_tiles, seen_by_all, seen_by_any, M, BLOCK_N, HAS_MASK)

    dq_sum = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dq_sum = _sum_over_keys(
        dq_sum, q_tile, do_tile, row_lse, row_delta, k, v, k_stride_m, v_stride_m, key_mask, key_tiles, 0, whole,
        gap_at, gap, row_end, M, scale_log2, D, BLOCK_D, BLOCK_N, HAS_MASK, False,
    )  # fmt: skip
    dq_sum = _sum_over_keys(
        dq_sum, q_tile, do_tile, row_lse, row_delta, k, v, k_stride_m, v_stride_m, key_mask, key_tiles, whole, total,
        gap_at, gap, row_end, M, scale_log2, D, BLOCK_D, BLOCK_N, HAS_MASK, True,
    )  # fmt: skip
    store_rows(dq + (b * N * Hq + h) * D, first_row, in_tile, Hq * D, dq_sum * scale, rows < N, D, BLOCK_D)


@jit
def _sum_over_keys(
    dq_sum, q_tile, do_tile, row_lse, row_delta, k, v, k_stride_m, v_stride_m, key_mask, key_tiles, first, last,
    gap_at, gap, row_end, M, scale_log2, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    next_tile = nth_tile(key_tiles, first, gap_at, gap, HAS_MASK)
    for i in range(first, last):
        first_key = next_tile * BLOCK_N
        # a tile ahead, as in the forward pass
        next_tile = nth_tile(key_tiles, i + 1, gap_at, gap, HAS_MASK)
        in_tile = tl.arange(0, BLOCK_N)
        keys = first_key + in_tile
        real = real_keys(key_mask, keys, M, HAS_MASK, MASKED)
        k_tile = load_rows(k, first_key, in_tile, k_stride_m, real, D, BLOCK_D, MASKED)
        v_tile = load_rows(v, first_key, in_tile, v_stride_m, real, D, BLOCK_D, MASKED)
        s = dot(q_tile, tl.trans(k_tile), None)
        p = tl.exp2(s * scale_log2 - row_lse[:, None])
        if MASKED:
            p = tl.where(tl.where(real, keys, M)[None, :] < row_end[:, None], p, 0.0)
        dp = dot(do_tile, tl.trans(v_tile), None)
        ds = (p * (dp - row_delta[:, None])).to(k_tile.dtype)
        dq_sum = dot(ds, k_tile, dq_sum)
    return dq_sum


def split_loop(block_d: int, deterministic: bool) -> bool:
    """Whether tiles without a mask have a loop of their own: elsewhere a second loop spills, or serializes products."""
    return block_d <= 64 and not deterministic


def adds_tiles(q: Tensor) -> bool:
    """Whether dQ is added to a tile at a time, by Hopper's tensor memory accelerator, rather than by each thread.

    Timed on an H200 alone, where it was faster at D = 64 and hardly so at D = 32.
    """
    return q.is_cuda and architecture_of(q.device) == 90 and q.element_size() == 2 and q.shape[-1] <= 64


def launch_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    causal_block: int | None,
    softmax_scale: float,
    deterministic: bool,
    tile: Tile | None = None,
    dq_tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from what launch_forward took and gave; `tile` and `dq_tile` stand in for the table's."""
    B, N, Hq, D = q.shape
    M, Hkv = k.shape[1:3]
    block_d = triton.next_power_of_2(D)
    tile = tile or choose_tile("backward", q, block_d)
    dq_tile = dq_tile or choose_tile("backward_dq", q, block_d)
    delta_tile = choose_tile("backward_delta", q, block_d)
    q, k, v, out, d_out = (addressable(x) for x in (q, k, v, out, d_out))
    mask, key_tiles = mask_and_tiles(key_mask, dq_tile.block_n if deterministic else None, q)
    causal_block = binding_causal_block(causal_block, N, M)
    group = Hq // Hkv
    scales = (softmax_scale, softmax_scale * math.log2(math.e))
    pattern = {"D": D, "BLOCK_D": block_d, "CAUSAL": causal_block is not None, "HAS_MASK": key_mask is not None}
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *d_out.stride()[:3])
    bytes_of_queries, bytes_of_keys = group * N * D * (2 * q.element_size() + 4), 2 * M * D * k.element_size()

    # for each tile the lse of its rows, then their delta; zeros past the last row
    padded_n = triton.cdiv(N, tile.block_m) * tile.block_m
    row_sums = lse.new_empty(B, Hq, padded_n // tile.block_m, 2, tile.block_m)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    dq_sum = lse if deterministic else lse.new_zeros(B, Hq, N, D)
    dq_in_tiles = not deterministic and adds_tiles(q)
    with torch.cuda.device_of(q):
        _flash_bwd_delta_kernel[(triton.cdiv(padded_n, delta_tile.block_m) * B * Hq,)](
            out, d_out, lse, row_sums, *out.stride()[:3], *d_out.stride()[:3], N, padded_n, Hq,
            D=D, BLOCK_D=block_d, BLOCK_M=delta_tile.block_m, SUMS_TILE=tile.block_m, **delta_tile.options(),
        )  # fmt: skip
        _flash_bwd_kernel[(triton.cdiv(M, tile.block_n) * B * Hkv,)](
            q, k, v, d_out, row_sums, tiles_of(dq_sum, tile.block_m, block_d) if dq_in_tiles else dq_sum, dk, dv, mask,
            *strides, B, N, padded_n, M, Hkv, group, causal_block or 0, *scales, heads_in_l2(bytes_of_queries, B * Hkv),
            **pattern, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, GROUPED=group > 1, ADD_DQ=not deterministic,
            DQ_IN_TILES=dq_in_tiles, SPLIT=split_loop(block_d, deterministic), **tile.options(),
        )  # fmt: skip
        if deterministic:
            _flash_bwd_dq_kernel[(triton.cdiv(N, dq_tile.block_m) * B * Hq,)](
                q, k, v, d_out, row_sums, dq, mask, key_tiles, *strides,
                B, N, padded_n, M, Hq, group, causal_block or 0, *scales, group * heads_in_l2(bytes_of_keys, B * Hkv),
                **pattern, BLOCK_M=dq_tile.block_m, BLOCK_N=dq_tile.block_n,
                SUMS_TILE=tile.block_m, **dq_tile.options(),
            )  # fmt: skip
        else:
            torch.mul(dq_sum.transpose(1, 2), softmax_scale, out=dq)
    return dq, dk, dv


def tiles_of(dq_sum: Tensor, block_m: int, block_d: int) -> Any:
    """A descriptor of dq_sum [B, Hq, N, D] in tiles of one head's rows, so that none reaches into the next head."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    B, Hq, N, D = dq_sum.shape
    return TensorDescriptor(dq_sum, [B * Hq, N, D], [N * D, D, 1], [1, block_m, block_d])
