# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of Gluon's functions are pointers, tiles and integers, which have no Python types)
"""launch_backward_hopper: flash_attention's backward pass for sm_90, by warpgroups that each go at their own pace.

The mathematics and the one pass over the scores are those of backward.py. What differs is who waits for whom. A program
holds 192 keys, 64 for each of its three consumers. A consumer is a warpgroup, four warps, that only computes. Four more
warps only load: they ask the tensor memory accelerator (TMA) for tiles of q, dO, lse and delta, which it puts into a
ring of buffers in shared memory. All consumers read these. While the program is at work no barrier spans it, so the
tensor cores multiply for one consumer while another takes exponentials. (Shah et al., "FlashAttention-3", 2024, divide
the warps in this way.) Of each query tile, a consumer in this order

    issues S = K Q^T;  waits;  P                      issues dP = V dO^T and dV += P^T dO
    waits for dP;  dS, into shared memory             issues dQ = dS^T K and dK += dS^T Q
    waits for dQ, into shared memory                  has TMA add it to the fp32 sum;  waits for dK

With D = 32 there are registers left. Then S of the next tile is issued with dQ and dK, and dP before P is computed.

A program starts at the first row that sees one of its keys, which need not be a multiple of the tile. Rows that see
nothing, whose values may be NaN, are never read. Rows past the end are TMA's zeros, and add zeros. TMA reads from
multiples of 16 bytes only. So there are four copies of lse and delta, the s-th without its first s rows.

Bytes and dtypes are those of backward.py, but lse and delta take 36 B N H. Inputs are bf16 or fp16, D is 32 or 64, and
each query head has its own key head. dQ is summed in any order, so this is not for deterministic mode.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from trunkline.kernels.attention.forward import (
    binding_causal_block,
    heads_in_l2,
    load_rows,
    mask_and_tiles,
    tile_and_head,
)
from trunkline.kernels.attention.hopper_memory import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    LOADING_WARPS,
    async_load,
    barrier,
    describable,
    descriptor,
)
from trunkline.kernels.attention.tiles import HOPPER_BACKWARD
from trunkline.kernels.triton_path import jit, tl, triton

BLOCK_M = gl.constexpr(64)  # queries of a tile
_NEVER = gl.constexpr(1 << 30)  # a row that no sequence has


@jit
def _flash_bwd_rows_kernel(
    out, d_out, lse, row_lse, row_delta, o_stride_b, o_stride_n, o_stride_h, do_stride_b, do_stride_n, do_stride_h,
    N, H, row_length, D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """lse, and delta = rowsum(dO * O), four times for each head: without the first 0, 1, 2 and 3 rows."""
    tile, head = tile_and_head(tl.cdiv(row_length + 3, BLOCK_M), tl.num_programs(0), 1)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    first_row = tile * BLOCK_M
    in_tile = tl.arange(0, BLOCK_M)
    rows = first_row + in_tile
    of_row = tl.load(lse + head.to(tl.int64) * N + rows, mask=rows < N, other=float("inf"))
    sees_any = of_row < float("inf")
    o = load_rows(out + b * o_stride_b + h * o_stride_h, first_row, in_tile, o_stride_n, sees_any, D, D, True)
    do = load_rows(d_out + b * do_stride_b + h * do_stride_h, first_row, in_tile, do_stride_n, sees_any, D, D, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    for shift in tl.static_range(4):
        columns = rows - shift
        target = (head.to(tl.int64) * 4 + shift) * row_length + columns
        inside = (columns >= 0) & (columns < row_length)
        tl.store(row_lse + target, of_row, mask=inside)
        tl.store(row_delta + target, delta, mask=inside)


# A program may start its walk this many query tiles after its neighbour. None does. The kernel was measured with the
# argument, and without it would be other machine code.
_TURN = 0
_NUMBERS = ["B", "N", "M", "H", "causal_block", "scale", "scale_log2", "heads_at_once", "turn"]
_STRIDES = [f"{x}_stride_{y}" for x in "kv" for y in "bmh"]


@gluon.jit(do_not_specialize=_STRIDES + _NUMBERS)
def _flash_bwd_hopper_kernel(
    q, d_out, row_lse, row_delta, dq_sum, k, v, dk, dv, key_mask,
    k_stride_b, k_stride_m, k_stride_h, v_stride_b, v_stride_m, v_stride_h,
    B, N, M, H, causal_block, scale, scale_log2, heads_at_once, turn,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, HAS_MASK: gl.constexpr,
):  # fmt: skip
    D: gl.constexpr = q.block_shape[3]
    BLOCK_N: gl.constexpr = 64 * CONSUMERS
    KEYS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], q.dtype)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_M], q.dtype)

    # the first keys are seen by the most queries: they start first
    tile, head = tile_and_head(gl.cdiv(M, BLOCK_N), B * H, heads_at_once)
    first_key = tile * BLOCK_N
    b, h = head // H, head % H
    key_mask += b.to(gl.int64) * M
    keys = first_key + gl.arange(0, 256, layout=gl.BlockedLayout([1], [32], [4], [0]))
    real = _real_keys(key_mask, keys, gl.minimum(M, first_key + BLOCK_N), HAS_MASK)
    first_row = gl.minimum(gl.min(_seen_from(keys, real, N, causal_block, CAUSAL), 0), N)
    total = gl.cdiv(N - first_row, BLOCK_M)
    start = tile * turn % gl.maximum(total, 1)  # in a circle: programs at work together add to dQ of different rows

    k_tiles = gl.allocate_shared_memory(k.dtype.element_ty, [CONSUMERS, 64, D], KEYS)
    v_tiles = gl.allocate_shared_memory(v.dtype.element_ty, [CONSUMERS, 64, D], KEYS)
    q_ring = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, BLOCK_M, D], q.layout)
    do_ring = gl.allocate_shared_memory(d_out.dtype, [STAGES, 1, 1, BLOCK_M, D], d_out.layout)
    lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], row_lse.layout)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], row_delta.layout)
    ds_tiles = gl.allocate_shared_memory(q.dtype, [CONSUMERS, 64, BLOCK_M], DS)
    dq_tiles = gl.allocate_shared_memory(gl.float32, [CONSUMERS, 1, BLOCK_M, D], dq_sum.layout)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    emptied = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(filled.index(stage), count=1)
        mbarrier.init(emptied.index(stage), count=CONSUMERS)
    fence_async_shared()
    barrier()

    rings = (q_ring, do_ring, lse_ring, delta_ring, filled, emptied)
    walk = (head, first_row, total, start)
    loads = (q, d_out, row_lse, row_delta, b, h)
    inputs = (k, v, k_stride_b, k_stride_m, k_stride_h, v_stride_b, v_stride_m, v_stride_h, key_mask, M)
    rest = (dq_sum, dk, dv, b, h, N, H, causal_block, scale, scale_log2)
    one = (k_tiles.index(0), v_tiles.index(0), ds_tiles.index(0), dq_tiles.index(0), first_key)
    two = (k_tiles.index(1), v_tiles.index(1), ds_tiles.index(1), dq_tiles.index(1), first_key + 64)
    three = (k_tiles.index(2), v_tiles.index(2), ds_tiles.index(2), dq_tiles.index(2), first_key + 128)
    gl.warp_specialize([
        (_load_query_tiles, (rings, walk, loads)),
        (_consume, (one, rings, walk, inputs, rest, CAUSAL, HAS_MASK)),
        (_consume, (two, rings, walk, inputs, rest, CAUSAL, HAS_MASK)),
        (_consume, (three, rings, walk, inputs, rest, CAUSAL, HAS_MASK)),
    ], [4, 4, 4], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, CONSUMER_REGISTERS])  # fmt: skip


@gluon.jit
def _load_query_tiles(rings, walk, loads):
    """What the warps do that load: each tile as soon as its buffer is empty."""
    q_ring, do_ring, lse_ring, delta_ring, filled, emptied = rings
    head, first_row, total, start = walk
    q, d_out, row_lse, row_delta, b, h = loads
    D: gl.constexpr = q_ring.shape[4]
    STAGES: gl.constexpr = q_ring.shape[0]
    for i in range(total):
        stage = i % STAGES
        landing = filled.index(stage)
        row = first_row + _turned(i, start, total) * BLOCK_M
        copy, column = head * 4 + (row & 3), row & -4
        mbarrier.wait(emptied.index(stage), (i // STAGES & 1) ^ 1)
        mbarrier.expect(landing, 2 * BLOCK_M * D * 2 + 2 * BLOCK_M * 4)
        async_load(q, [b, h, row, 0], landing, q_ring.index(stage))
        async_load(row_lse, [copy, column], landing, lse_ring.index(stage))
        async_load(d_out, [b, h, row, 0], landing, do_ring.index(stage))
        async_load(row_delta, [copy, column], landing, delta_ring.index(stage))


@gluon.jit
def _consume(tiles, rings, walk, inputs, rest, CAUSAL: gl.constexpr, HAS_MASK: gl.constexpr):
    """What the others do: dK and dV of 64 keys, and their share of dQ, from all rows that see a key of the program."""
    k_tile, v_tile, ds_tile, dq_tile, first_key = tiles
    q_ring, do_ring, lse_ring, delta_ring, filled, emptied = rings
    head, first_row, total, start = walk
    k, v, k_stride_b, k_stride_m, k_stride_h, v_stride_b, v_stride_m, v_stride_h, key_mask, M = inputs
    dq_sum, dk, dv, b, h, N, H, causal_block, scale, scale_log2 = rest
    dtype: gl.constexpr = k_tile.dtype
    D: gl.constexpr = q_ring.shape[4]
    STAGES: gl.constexpr = q_ring.shape[0]
    SCORES_AHEAD: gl.constexpr = D <= 32
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)

    b, h = b.to(gl.int64), h.to(gl.int64)
    _load_keys(k + b * k_stride_b + h * k_stride_h, first_key, k_stride_m, key_mask, M, k_tile, HAS_MASK)
    _load_keys(v + b * v_stride_b + h * v_stride_h, first_key, v_stride_m, key_mask, M, v_tile, HAS_MASK)
    fence_async_shared()
    barrier()

    keys = first_key + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    seen_from = _seen_from(keys, _real_keys(key_mask, keys, M, HAS_MASK), N, causal_block, CAUSAL)
    masked = gl.minimum(gl.cdiv(gl.max(seen_from, 0) - first_row, BLOCK_M), total)
    no_scores = gl.zeros([64, BLOCK_M], gl.float32, SCORES)
    no_dq = gl.zeros([BLOCK_M, D], gl.float32, SUMS)
    dk_sum = gl.zeros([64, D], gl.float32, SUMS)
    dv_sum = gl.zeros([64, D], gl.float32, SUMS)
    mbarrier.wait(filled.index(0), 0, pred=total > 0)
    s = no_scores
    if SCORES_AHEAD:
        s = warpgroup_mma_wait(0, [_product(k_tile, _rows(q_ring, 0), no_scores)])
    for i in range(total):
        at, stage, after = _turned(i, start, total), i % STAGES, (i + 1) % STAGES
        q_tile, do_tile = _rows(q_ring, stage), _rows(do_ring, stage)
        if SCORES_AHEAD:
            dp = _product(v_tile, do_tile, no_scores)
        else:
            s = warpgroup_mma_wait(0, [_product(k_tile, q_tile, no_scores)])
        row_lse = lse_ring.index(stage).reshape([BLOCK_M]).load(gl.SliceLayout(0, SCORES))
        p = gl.exp2(s * scale_log2 - row_lse[None, :])
        if at < masked:  # a row does not see every key
            rows = first_row + at * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, SCORES))
            p = gl.where(seen_from[:, None] <= rows[None, :], p, 0.0)
        if not SCORES_AHEAD:  # half of the registers that dP takes are those of the scores
            p = p.to(dtype)
            dp = _product(v_tile, do_tile, no_scores)
        p_left = gl.convert_layout(p.to(dtype), LEFT, assert_trivial=True)
        dv_sum = warpgroup_mma(p_left, do_tile, dv_sum, is_async=True)
        dp = warpgroup_mma_wait(1, [dp])
        row_delta = delta_ring.index(stage).reshape([BLOCK_M]).load(gl.SliceLayout(0, SCORES))
        ds = (_wide(p) * (dp - row_delta[None, :])).to(dtype)
        ds_tile.store(ds)
        fence_async_shared()
        tma.store_wait(0)  # dQ of the tile before has been read
        if SCORES_AHEAD:
            mbarrier.wait(filled.index(after), (i + 1) // STAGES & 1, pred=i + 1 < total)
        barrier()
        dq = warpgroup_mma(ds_tile.permute([1, 0]), k_tile, no_dq, use_acc=False, is_async=True)
        ds_left = gl.convert_layout(ds, LEFT, assert_trivial=True)
        dk_sum = warpgroup_mma(ds_left, q_tile, dk_sum, is_async=True)
        if SCORES_AHEAD:  # after the last tile, of whatever is in the buffer
            s = _product(k_tile, _rows(q_ring, after), no_scores)
            dq, dv_sum, p_left = warpgroup_mma_wait(2, [dq, dv_sum, p_left])
        else:
            dq, dv_sum, p_left = warpgroup_mma_wait(1, [dq, dv_sum, p_left])
        dq_tile.reshape([BLOCK_M, D]).store(dq)
        fence_async_shared()
        # since the barrier above, every warp has seen the end of all products of the tile before
        mbarrier.arrive(emptied.index((i + STAGES - 1) % STAGES), count=1, pred=i > 0)
        barrier()
        _reduce_add(dq_sum, [head, first_row + at * BLOCK_M, 0], dq_tile)
        if SCORES_AHEAD:
            s, dk_sum, ds_left = warpgroup_mma_wait(0, [s, dk_sum, ds_left])
        else:
            mbarrier.wait(filled.index(after), (i + 1) // STAGES & 1, pred=i + 1 < total)
            dk_sum, ds_left = warpgroup_mma_wait(0, [dk_sum, ds_left])
    tma.store_wait(0)

    keys = first_key + gl.arange(0, 64, layout=gl.SliceLayout(1, SUMS))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, SUMS))
    offsets = (b * M * H + h) * D + keys.to(gl.int64)[:, None] * (H * D) + columns[None, :]
    gl.store(dk + offsets, (dk_sum * scale).to(dtype), mask=(keys < M)[:, None])
    gl.store(dv + offsets, dv_sum.to(dtype), mask=(keys < M)[:, None])


@builtin
def _reduce_add(descriptor, coordinates, source, _semantic=None):
    """Has TMA add a tile of shared memory into global memory: tma.async_atomic_add, which comes with Triton 3.9."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    add = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(add, descriptor.handle, coordinates, source.handle)


@gluon.jit
def _turned(i, start, total):
    """The i-th tile of a walk in a circle."""
    i += start
    return gl.where(i >= total, i - total, i)


@gluon.jit
def _rows(ring, stage):
    return ring.index(stage).reshape([ring.shape[3], ring.shape[4]])


@gluon.jit
def _product(left, right, zeros):
    """left right^T, which is under way."""
    return warpgroup_mma(left, right.permute([1, 0]), zeros, use_acc=False, is_async=True)


@gluon.jit
def _real_keys(key_mask, keys, M, HAS_MASK: gl.constexpr):
    real = keys < M
    if HAS_MASK:
        real = gl.load(key_mask + keys, mask=real, other=0) != 0
    return real


@gluon.jit
def _seen_from(keys, real, N, causal_block, CAUSAL: gl.constexpr):
    """The first row that sees each key."""
    seen_from = gl.minimum(keys // causal_block * causal_block, N) if CAUSAL else keys * 0
    return gl.where(real, seen_from, _NEVER)


@gluon.jit
def _load_keys(x, first_key, stride, key_mask, M, tile, HAS_MASK: gl.constexpr):
    """The rows of 64 keys, padding as zeros, into shared memory."""
    D: gl.constexpr = tile.shape[1]
    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    in_tile = gl.arange(0, 64, layout=gl.SliceLayout(1, LOADED))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, LOADED))
    real = _real_keys(key_mask, first_key + in_tile, M, HAS_MASK)
    start = gl.multiple_of(x + first_key.to(gl.int64) * stride, 16)  # see `addressable`
    pointers = start + (gl.multiple_of(in_tile[:, None] * stride, (8, 8)) + columns[None, :])
    tile.store(gl.load(pointers, mask=real[:, None], other=0.0))


@gluon.jit
def _wide(p):
    """p in fp32. From 16 bits by code for pairs: else the compiler keeps each value in a register of its own."""
    if p.dtype == gl.float32:
        return p
    CODE: gl.constexpr = _WIDEN_BF16 if p.dtype == gl.bfloat16 else _WIDEN_FP16
    return gl.inline_asm_elementwise(CODE, "=r,=r,r", [p], dtype=gl.float32, is_pure=True, pack=2)


_WIDEN_BF16 = gl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")
_WIDEN_FP16 = gl.constexpr(
    "{ .reg .b16 low, high; mov.b32 {low, high}, $2; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"
)


def launch_backward_hopper(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    causal_block: int | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from what launch_forward took and gave: 16-bit, D of 32 or 64, as many heads in k as in q."""
    B, N, H, D = q.shape
    M = k.shape[1]
    tile = HOPPER_BACKWARD[D]
    rows = BLOCK_M.value
    q, k, v, out, d_out = (describable(x) for x in (q, k, v, out, d_out))
    mask, _ = mask_and_tiles(key_mask, None, q)
    causal_block = binding_causal_block(causal_block, N, M)
    row_length = -(-N // 4) * 4
    row_lse, row_delta = lse.new_empty(B * H * 4, row_length), lse.new_empty(B * H * 4, row_length)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    dq_sum = lse.new_zeros(B, H, N, D)
    with torch.cuda.device_of(q):
        _flash_bwd_rows_kernel[(triton.cdiv(row_length + 3, 128) * B * H,)](
            out, d_out, lse, row_lse, row_delta, *out.stride()[:3], *d_out.stride()[:3], N, H, row_length,
            D=D, BLOCK_M=128, num_warps=4,
        )  # fmt: skip
        _flash_bwd_hopper_kernel[(triton.cdiv(M, tile.block_n) * B * H,)](
            *(descriptor(x.transpose(1, 2), [1, 1, rows, D]) for x in (q, d_out)),
            *(descriptor(x, [1, rows]) for x in (row_lse, row_delta)),
            descriptor(dq_sum.flatten(0, 1), [1, rows, D]),
            k, v, dk, dv, mask, *k.stride()[:3], *v.stride()[:3],
            B, N, M, H, causal_block or 1, softmax_scale, softmax_scale * math.log2(math.e),
            heads_in_l2(N * D * (2 * q.element_size() + 4), B * H), _TURN,
            STAGES=tile.num_stages, CAUSAL=causal_block is not None, HAS_MASK=key_mask is not None,
            num_warps=LOADING_WARPS, maxnreg=tile.max_registers, enable_fp_fusion=True,
        )  # fmt: skip
        torch.mul(dq_sum.transpose(1, 2), softmax_scale, out=dq)
    return dq, dk, dv
