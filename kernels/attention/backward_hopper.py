# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of Triton's functions are pointers, tiles and integers, which have no Python types)
"""launch_backward for sm_90: flash_attention's backward pass in one pass, with products in flight during arithmetic.

    P = exp(S - lse),  dV = P^T dO,  dS = P * (dO V^T - delta),  dQ = s dS K,  dK = s dS^T Q,  delta = rowsum(dO * O)

The plain kernel's pass (see backward.py), in Gluon: Triton itself waits for all products before it reads one. A program
holds a tile of keys, K and V in shared memory, and walks over query tiles that the copy engine brings into a ring of
buffers. Of tile i, in the order of issue:

    dP_i        exponentials of S_i meanwhile, which was issued in the iteration before; dK and dQ of i - 1 run too
    dV, S_i+1   dS_i meanwhile, and dQ of i - 1 is added into the fp32 sum
    dK, dQ_i    dP_i+1 follows at once

Walks start at the first row that sees a key of the tile, not at a multiple of the tile: so rows that see nothing, whose
values may be NaN, are never read. Rows past the end are the copy engine's zeros, and add zeros.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from trunkline.kernels.attention.forward import (
    addressable,
    binding_causal_block,
    heads_in_l2,
    load_rows,
    mask_and_tiles,
)
from trunkline.kernels.triton_path import jit

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
_NEVER = gl.constexpr(1 << 30)


@jit
def _row_statistics_kernel(
    out, d_out, lse, row_lse, row_delta, o_stride_b, o_stride_n, o_stride_h, do_stride_b, do_stride_n, do_stride_h,
    N, Hq, row_length, D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """lse and delta for the copy engine, which reads from multiples of 16 bytes only: each four times, the s-th time
    without its first s rows, in rows of `row_length`."""
    num_tiles = tl.cdiv(row_length + 3, BLOCK_M)
    tile, head = tl.program_id(0) % num_tiles, tl.program_id(0) // num_tiles
    b, h = (head // Hq).to(tl.int64), (head % Hq).to(tl.int64)
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


@gluon.jit
def _expect(descriptors, ready, slot, wanted):
    """Each part of a query tile has its own barriers: the compiler tells shared memory apart by allocation, and would
    have all warps meet before each copy."""
    for i in gl.static_range(4):
        mbarrier.expect(ready[i].index(slot), descriptors[i].block_type.nbytes, pred=wanted)


@gluon.jit
def _fetch(descriptors, rings, ready, slot, b, h, head, row, wanted):
    """Ask for the query tile at `row`: Q, dO, lse and delta."""
    for i in gl.static_range(4):
        if i < 2:
            tma.async_copy_global_to_shared(
                descriptors[i], [b, h, row, 0], ready[i].index(slot), rings[i].index(slot), pred=wanted
            )
        else:
            tma.async_copy_global_to_shared(
                descriptors[i], [head * 4 + (row & 3), row & -4], ready[i].index(slot), rings[i].index(slot), pred=wanted
            )


@builtin
def _reduce_add(descriptor, coordinates, source, _semantic=None):
    """Have the copy engine add a tile of shared memory into global memory."""
    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    _semantic.builder.create_async_tma_reduce(
        ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, coordinates, source.handle
    )


@gluon.jit
def _await(ready, slot, phase):
    for i in gl.static_range(4):
        mbarrier.wait(ready[i].index(slot), phase)


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
def _probabilities(
    s, lse_tile, scale_log2, first_row, tile, masked, seen_from, BLOCK_M: gl.constexpr, score_layout: gl.constexpr
):
    """P of a query tile; those before tile `masked` have a row that does not see every key."""
    row_lse = lse_tile.reshape([BLOCK_M]).load(gl.SliceLayout(0, score_layout))
    p = gl.exp2(s * scale_log2 - row_lse[None, :])
    if tile < masked:
        rows = first_row + tile * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, score_layout))
        p = gl.where(seen_from[:, None] <= rows[None, :], p, 0.0)
    return p


@gluon.jit
def _add_dq(dq_sum, dq, tile, zero, BLOCK_M: gl.constexpr, D: gl.constexpr, layout: gl.constexpr):
    """Add to the rows of `tile`, while other programs do the same; before the first tile, zeros to the first."""
    rows = zero + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    start = dq_sum + gl.maximum(tile, 0).to(gl.int64) * (BLOCK_M * D)
    gl.atomic_add(start + (rows[:, None] * D + columns[None, :]), dq, sem="relaxed")


_NUMBERS = "B N M H sum_rows causal_block scale scale_log2 heads_at_once".split()


@gluon.jit(do_not_specialize=[f"{x}_stride_{y}" for x in "kv" for y in "bmh"] + _NUMBERS)
def _flash_bwd_hopper_kernel(
    q_desc, do_desc, lse_desc, delta_desc, dq_desc, k, v, dq_sum, dk, dv, key_mask,
    k_stride_b, k_stride_m, k_stride_h, v_stride_b, v_stride_m, v_stride_h,
    B, N, M, H, sum_rows, causal_block, scale, scale_log2, heads_at_once,
    D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr, ADD: gl.constexpr,
    CAUSAL: gl.constexpr, HAS_MASK: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_M, 16])
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 16])
    left_layout: gl.constexpr = gl.DotOperandLayout(0, sum_layout, 2)
    dq_split: gl.constexpr = num_warps * 16 // BLOCK_M if num_warps * 16 > BLOCK_M else 1
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [num_warps // dq_split, dq_split], [16, D // dq_split, 16]
    )
    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [num_warps, 1], [1, 0])
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], dtype)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], dtype)

    # the first keys are seen by the most queries: they start first; few heads at a time, which stay in the cache
    num_tiles = gl.cdiv(M, BLOCK_N)
    pid = gl.program_id(0)
    first_head = pid // (num_tiles * heads_at_once) * heads_at_once
    among = gl.minimum(heads_at_once, B * H - first_head)
    rest = pid - first_head * num_tiles
    first_key = rest // among * BLOCK_N
    head = first_head + rest % among
    b, h = head // H, head % H
    b64, h64 = b.to(gl.int64), h.to(gl.int64)
    key_mask += b64 * M

    # K and V, padding as zeros
    keys = first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, load_layout))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, load_layout))
    real = _real_keys(key_mask, keys, M, HAS_MASK)
    seen_from = _seen_from(keys, real, N, causal_block, CAUSAL)
    first_row = gl.minimum(gl.min(seen_from, 0), N)
    total = gl.cdiv(N - first_row, BLOCK_M)
    masked = gl.minimum(gl.cdiv(gl.max(seen_from, 0) - first_row, BLOCK_M), total)
    k_tiles = gl.allocate_shared_memory(dtype, [1, BLOCK_N, D], tile_layout)
    v_tiles = gl.allocate_shared_memory(dtype, [1, BLOCK_N, D], tile_layout)
    k_tile, v_tile = k_tiles.index(0), v_tiles.index(0)
    in_tile = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, load_layout))
    k_start = gl.multiple_of(k + b64 * k_stride_b + h64 * k_stride_h + first_key.to(gl.int64) * k_stride_m, 16)
    v_start = gl.multiple_of(v + b64 * v_stride_b + h64 * v_stride_h + first_key.to(gl.int64) * v_stride_m, 16)
    k_pointers = k_start + (gl.multiple_of(in_tile[:, None] * k_stride_m, (8, 8)) + columns[None, :])
    v_pointers = v_start + (gl.multiple_of(in_tile[:, None] * v_stride_m, (8, 8)) + columns[None, :])
    k_tile.store(gl.load(k_pointers, mask=real[:, None], other=0.0))
    v_tile.store(gl.load(v_pointers, mask=real[:, None], other=0.0))

    q_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, D], q_desc.layout)
    do_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, D], do_desc.layout)
    lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], lse_desc.layout)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], delta_desc.layout)
    ds_tiles = gl.allocate_shared_memory(dtype, [1, BLOCK_N, BLOCK_M], ds_layout)
    dq_tiles = gl.allocate_shared_memory(gl.float32, [1, 1, BLOCK_M, D], dq_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    lse_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    delta_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(q_ready.index(stage), count=1)
        mbarrier.init(do_ready.index(stage), count=1)
        mbarrier.init(lse_ready.index(stage), count=1)
        mbarrier.init(delta_ready.index(stage), count=1)
    fence_async_shared()
    _barrier()
    descriptors = (q_desc, do_desc, lse_desc, delta_desc)
    rings = (q_ring, do_ring, lse_ring, delta_ring)
    ready = (q_ready, do_ready, lse_ready, delta_ready)
    # two tiles past the end are fetched too: the last iterations await and use them like any other
    for stage in gl.static_range(STAGES - 1):
        _expect(descriptors, ready, stage, stage < total + 2)
    _barrier()
    for stage in gl.static_range(STAGES - 1):
        _fetch(descriptors, rings, ready, stage, b, h, head, first_row + stage * BLOCK_M, stage < total + 2)

    # the first row that sees each key of the scores' layout
    keys_of_scores = first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, score_layout))
    seen_from_of_scores = _seen_from(
        keys_of_scores, _real_keys(key_mask, keys_of_scores, M, HAS_MASK), N, causal_block, CAUSAL
    )
    dq_sum += (head.to(gl.int64) * sum_rows + first_row) * D

    no_scores = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, score_layout)
    no_dq = gl.zeros([BLOCK_M, D], gl.float32, dq_layout)
    dk_sum = gl.zeros([BLOCK_N, D], gl.float32, sum_layout)
    dv_sum = gl.zeros([BLOCK_N, D], gl.float32, sum_layout)
    dq = no_dq

    _await(ready, 0, 0)
    _await(ready, 1, 0)
    s = warpgroup_mma(
        k_tile, q_ring.index(0).reshape([BLOCK_M, D]).permute([1, 0]), no_scores, use_acc=False, is_async=True
    )
    dp = warpgroup_mma(
        v_tile, do_ring.index(0).reshape([BLOCK_M, D]).permute([1, 0]), no_scores, use_acc=False, is_async=True
    )
    s, dp = warpgroup_mma_wait(0, [s, dp])
    p = _probabilities(
        s, lse_ring.index(0), scale_log2, first_row, 0, masked, seen_from_of_scores, BLOCK_M, score_layout
    )

    for i in range(total):
        # Of tile i there are P, dP and, in shared memory, the rest; of tile i - 1 there is dQ; tile i + 1 is in shared
        # memory. No product is in flight.
        # 0, but the compiler does not know: it would keep 24 addresses in 48 registers, which D = 64 does not have
        zero = i >> 30 if D > 32 else 0
        k_tile, v_tile, ds_tile = k_tiles.index(zero), v_tiles.index(zero), ds_tiles.index(zero)
        slot, after, before = i % STAGES, (i + 1) % STAGES, (i + STAGES - 1) % STAGES
        wanted = i + STAGES - 1 < total + 2
        q_tile = q_ring.index(slot).reshape([BLOCK_M, D])
        do_tile = do_ring.index(slot).reshape([BLOCK_M, D])
        p_left = gl.convert_layout(p.to(dtype), left_layout)
        if ADD == "tma":
            tma.store_wait(0)  # dQ of i - 2 has been read
        _barrier()  # every warp is done with dQ of i - 1, and so with its dS and with all of its buffers
        dv_sum = warpgroup_mma(p_left, do_tile, dv_sum, is_async=True)
        if ADD == "first":
            _add_dq(dq_sum, dq, i - 1, zero, BLOCK_M, D, dq_layout)
        q_after = q_ring.index(after).reshape([BLOCK_M, D]).permute([1, 0])
        if ADD == "tma":
            dq_tiles.index(zero).reshape([BLOCK_M, D]).store(dq)
        if EARLY:
            s = warpgroup_mma(k_tile, q_after, no_scores, use_acc=False, is_async=True)
        row_delta = delta_ring.index(slot).reshape([BLOCK_M]).load(gl.SliceLayout(0, score_layout))
        ds = (p * (dp - row_delta[None, :])).to(dtype)
        ds_tile.store(ds)
        fence_async_shared()
        if ADD == "late":  # or the fence would wait for them
            _add_dq(dq_sum, dq, i - 1, zero, BLOCK_M, D, dq_layout)
        _expect(descriptors, ready, before, wanted)
        _barrier()
        if ADD == "tma":
            _reduce_add(dq_desc, [head, first_row + gl.maximum(i - 1, 0) * BLOCK_M, 0], dq_tiles.index(0))
        _fetch(descriptors, rings, ready, before, b, h, head, first_row + (i + STAGES - 1) * BLOCK_M, wanted)
        if not EARLY:  # a tile's scores less in registers
            s = warpgroup_mma(k_tile, q_after, no_scores, use_acc=False, is_async=True)
        ds_left = gl.convert_layout(ds, left_layout)
        dk_sum = warpgroup_mma(ds_left, q_tile, dk_sum, is_async=True)
        dq = warpgroup_mma(ds_tile.permute([1, 0]), k_tile, no_dq, use_acc=False, is_async=True)
        do_after = do_ring.index(after).reshape([BLOCK_M, D])
        dp = warpgroup_mma(v_tile, do_after.permute([1, 0]), no_scores, use_acc=False, is_async=True)
        # in flight: dK and dQ of i, dP of i + 1
        s, dv_sum, p_left = warpgroup_mma_wait(3, [s, dv_sum, p_left])
        p = _probabilities(
            s, lse_ring.index(after), scale_log2, first_row, i + 1, masked, seen_from_of_scores, BLOCK_M, score_layout
        )
        _await(ready, (i + 2) % STAGES, (i + 2) // STAGES & 1)
        dp, dq, dk_sum, ds_left = warpgroup_mma_wait(0, [dp, dq, dk_sum, ds_left])

    if ADD == "tma":
        tma.store_wait(0)
        _barrier()
        dq_tiles.index(0).reshape([BLOCK_M, D]).store(dq)
        fence_async_shared()
        _barrier()
        _reduce_add(dq_desc, [head, first_row + gl.maximum(total - 1, 0) * BLOCK_M, 0], dq_tiles.index(0))
        tma.store_wait(0)
    elif ADD != "none":
        _add_dq(dq_sum, dq, total - 1, 0, BLOCK_M, D, dq_layout)

    keys_of_sums = first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, sum_layout))
    columns_of_sums = gl.arange(0, D, layout=gl.SliceLayout(0, sum_layout))
    offsets = (b64 * M * H + h64) * D + keys_of_sums.to(gl.int64)[:, None] * (H * D) + columns_of_sums[None, :]
    gl.store(dk + offsets, (dk_sum * scale).to(dtype), mask=(keys_of_sums < M)[:, None])
    gl.store(dv + offsets, dv_sum.to(dtype), mask=(keys_of_sums < M)[:, None])


_SPECIALISED_NUMBERS = "B N M H causal_block scale scale_log2 heads_at_once turn".split()


@gluon.jit(do_not_specialize=[f"{x}_stride_{y}" for x in "kv" for y in "bmh"] + _SPECIALISED_NUMBERS)
def _flash_bwd_specialised_kernel(
    q_desc, do_desc, lse_desc, delta_desc, dq_desc, k, v, dk, dv, key_mask,
    k_stride_b, k_stride_m, k_stride_h, v_stride_b, v_stride_m, v_stride_h,
    B, N, M, H, causal_block, scale, scale_log2, heads_at_once, turn,
    D: gl.constexpr, BLOCK_M: gl.constexpr, CONSUMERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    STAGES: gl.constexpr, LEAN: gl.constexpr, HALF: gl.constexpr, ADD: gl.constexpr,
    KEYS_IN_REGISTERS: gl.constexpr, EARLY: gl.constexpr,     CAUSAL: gl.constexpr, HAS_MASK: gl.constexpr,
):  # fmt: skip
    """The same by `CONSUMERS` warpgroups of 64 keys each, and four warps that ask for the query tiles."""
    BLOCK_N: gl.constexpr = 64 * CONSUMERS
    dtype: gl.constexpr = q_desc.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], dtype)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_M], dtype)

    num_tiles = gl.cdiv(M, BLOCK_N)
    pid = gl.program_id(0)
    first_head = pid // (num_tiles * heads_at_once) * heads_at_once
    among = gl.minimum(heads_at_once, B * H - first_head)
    rest = pid - first_head * num_tiles
    tile = rest // among
    first_key = tile * BLOCK_N
    head = first_head + rest % among
    b, h = head // H, head % H
    key_mask += b.to(gl.int64) * M

    keys = first_key + gl.arange(0, 128 if CONSUMERS == 2 else 256, layout=gl.BlockedLayout([1], [32], [4], [0]))
    real = _real_keys(key_mask, keys, gl.minimum(M, first_key + BLOCK_N), HAS_MASK)
    first_row = gl.minimum(gl.min(_seen_from(keys, real, N, causal_block, CAUSAL), 0), N)
    total = gl.cdiv(N - first_row, BLOCK_M)
    # programs that run at the same time start at different rows, whose dQ they add to
    start = tile * turn % gl.maximum(total, 1)

    k_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, 64, D], tile_layout)
    v_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, 64, D], tile_layout)
    q_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, D], q_desc.layout)
    do_ring = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, D], do_desc.layout)
    lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], lse_desc.layout)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], delta_desc.layout)
    ds_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, 64, BLOCK_M], ds_layout)
    dq_tiles = gl.allocate_shared_memory(gl.float32, [CONSUMERS, 1, BLOCK_M, D], dq_desc.layout)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    emptied = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(filled.index(stage), count=1)
        mbarrier.init(emptied.index(stage), count=CONSUMERS)
    fence_async_shared()
    _barrier()

    # a tile past the end is fetched too: the last iterations use it like any other
    fetched = total if LEAN else total + 1
    loads = (q_desc, do_desc, lse_desc, delta_desc, q_ring, do_ring, lse_ring, delta_ring, filled, emptied,
             b, h, head, first_row, fetched, start, total)  # fmt: skip
    rings = (q_ring, do_ring, lse_ring, delta_ring, filled, emptied, dq_desc, head, first_row, total, start, scale_log2)
    keys_and_values = (k, v, k_stride_b, k_stride_m, k_stride_h, v_stride_b, v_stride_m, v_stride_h)
    rest = (dk, dv, key_mask, b, h, N, M, H, causal_block, scale)
    one = (k_tiles.index(0), v_tiles.index(0), ds_tiles.index(0), dq_tiles.index(0), first_key)
    two = (k_tiles.index(1), v_tiles.index(1), ds_tiles.index(1), dq_tiles.index(1), first_key + 64)
    if CONSUMERS == 2:
        gl.warp_specialize([
            (_load_query_tiles, (loads,)),
            (_consume, (one, rings, keys_and_values, rest, LEAN, HALF, ADD, KEYS_IN_REGISTERS, EARLY, CAUSAL, HAS_MASK)),
            (_consume, (two, rings, keys_and_values, rest, LEAN, HALF, ADD, KEYS_IN_REGISTERS, EARLY, CAUSAL, HAS_MASK)),
        ], [4, 4], [CONSUMER_REGISTERS] * 2)  # fmt: skip
    elif CONSUMERS == 3:
        three = (k_tiles.index(2), v_tiles.index(2), ds_tiles.index(2), dq_tiles.index(2), first_key + 128)
        gl.warp_specialize([
            (_load_query_tiles, (loads,)),
            (_consume, (one, rings, keys_and_values, rest, LEAN, HALF, ADD, KEYS_IN_REGISTERS, EARLY, CAUSAL, HAS_MASK)),
            (_consume, (two, rings, keys_and_values, rest, LEAN, HALF, ADD, KEYS_IN_REGISTERS, EARLY, CAUSAL, HAS_MASK)),
            (_consume, (three, rings, keys_and_values, rest, LEAN, HALF, ADD, KEYS_IN_REGISTERS, EARLY, CAUSAL, HAS_MASK)),
        ], [4, 4, 4], [CONSUMER_REGISTERS] * 3)  # fmt: skip
    else:
        three = (k_tiles.index(2), v_tiles.index(2), ds_tiles.index(2), dq_tiles.index(2), first_key + 128)
        four = (k_tiles.index(3), v_tiles.index(3), ds_tiles.index(3), dq_tiles.index(3), first_key + 192)
        gl.warp_specialize([
            (_load_query_tiles, (loads,)),
            (_consume, (one, rings, keys_and_values, rest, LEAN, HALF, ADD, KEYS_IN_REGISTERS, EARLY, CAUSAL, HAS_MASK)),
            (_consume, (two, rings, keys_and_values, rest, LEAN, HALF, ADD, KEYS_IN_REGISTERS, EARLY, CAUSAL, HAS_MASK)),
            (_consume, (three, rings, keys_and_values, rest, LEAN, HALF, ADD, KEYS_IN_REGISTERS, EARLY, CAUSAL, HAS_MASK)),
            (_consume, (four, rings, keys_and_values, rest, LEAN, HALF, ADD, KEYS_IN_REGISTERS, EARLY, CAUSAL, HAS_MASK)),
        ], [4, 4, 4, 4], [CONSUMER_REGISTERS] * 4)  # fmt: skip


@gluon.jit
def _load_query_tiles(loads):
    """What the warps do that load: each tile as soon as its buffer is empty."""
    q_desc, do_desc, lse_desc, delta_desc, q_ring, do_ring, lse_ring, delta_ring, filled, emptied, b, h, head, first_row, fetched, start, total = loads
    STAGES: gl.constexpr = q_ring.shape[0]
    BLOCK_M: gl.constexpr = q_ring.shape[3]
    D: gl.constexpr = q_ring.shape[4]
    for i in range(fetched):
        stage = i % STAGES
        ready = filled.index(stage)
        row = first_row + _turned(i, start, total) * BLOCK_M
        mbarrier.wait(emptied.index(stage), (i // STAGES & 1) ^ 1)
        mbarrier.expect(ready, 2 * BLOCK_M * D * 2 + 2 * BLOCK_M * 4)
        tma.async_copy_global_to_shared(q_desc, [b, h, row, 0], ready, q_ring.index(stage))
        tma.async_copy_global_to_shared(lse_desc, [head * 4 + (row & 3), row & -4], ready, lse_ring.index(stage))
        tma.async_copy_global_to_shared(do_desc, [b, h, row, 0], ready, do_ring.index(stage))
        tma.async_copy_global_to_shared(delta_desc, [head * 4 + (row & 3), row & -4], ready, delta_ring.index(stage))


@gluon.jit
def _consume(
    tiles, rings, keys_and_values, rest,
    LEAN: gl.constexpr, HALF: gl.constexpr, ADD: gl.constexpr, KEYS_IN_REGISTERS: gl.constexpr, EARLY: gl.constexpr, CAUSAL: gl.constexpr, HAS_MASK: gl.constexpr,
):  # fmt: skip
    """What the others do: 64 keys and all rows that see one of them."""
    k_tile, v_tile, ds_tile, dq_tile, first_key = tiles
    q_ring, do_ring, lse_ring, delta_ring, filled, emptied, dq_desc, head, first_row, total, start, scale_log2 = rings
    k, v, k_stride_b, k_stride_m, k_stride_h, v_stride_b, v_stride_m, v_stride_h = keys_and_values
    dk, dv, key_mask, b, h, N, M, H, causal_block, scale = rest
    dtype: gl.constexpr = k_tile.dtype
    STAGES: gl.constexpr = q_ring.shape[0]
    BLOCK_M: gl.constexpr = q_ring.shape[3]
    D: gl.constexpr = q_ring.shape[4]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    left_layout: gl.constexpr = gl.DotOperandLayout(0, sum_layout, 2)
    load_layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // D, D // 8], [4, 1], [1, 0])

    b64, h64 = b.to(gl.int64), h.to(gl.int64)
    in_tile = gl.arange(0, 64, layout=gl.SliceLayout(1, load_layout))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, load_layout))
    real = _real_keys(key_mask, first_key + in_tile, M, HAS_MASK)
    k_start = gl.multiple_of(k + b64 * k_stride_b + h64 * k_stride_h + first_key.to(gl.int64) * k_stride_m, 16)
    v_start = gl.multiple_of(v + b64 * v_stride_b + h64 * v_stride_h + first_key.to(gl.int64) * v_stride_m, 16)
    k_pointers = k_start + (gl.multiple_of(in_tile[:, None] * k_stride_m, (8, 8)) + columns[None, :])
    v_pointers = v_start + (gl.multiple_of(in_tile[:, None] * v_stride_m, (8, 8)) + columns[None, :])
    k_tile.store(gl.load(k_pointers, mask=real[:, None], other=0.0))
    v_tile.store(gl.load(v_pointers, mask=real[:, None], other=0.0))
    fence_async_shared()
    _barrier()

    keys = first_key + gl.arange(0, 64, layout=gl.SliceLayout(1, score_layout))
    seen_from = _seen_from(keys, _real_keys(key_mask, keys, M, HAS_MASK), N, causal_block, CAUSAL)
    masked = gl.minimum(gl.cdiv(gl.max(seen_from, 0) - first_row, BLOCK_M), total)

    no_scores = gl.zeros([64, BLOCK_M], gl.float32, score_layout)
    no_dq = gl.zeros([BLOCK_M, D], gl.float32, sum_layout)
    dk_sum = gl.zeros([64, D], gl.float32, sum_layout)
    dv_sum = gl.zeros([64, D], gl.float32, sum_layout)
    dq = no_dq
    if LEAN:
        k_left, v_left = k_tile, v_tile
        if KEYS_IN_REGISTERS:
            k_left = k_tile.load(gl.DotOperandLayout(0, score_layout, 2))
            v_left = v_tile.load(gl.DotOperandLayout(0, score_layout, 2))
        mbarrier.wait(filled.index(0), 0, pred=total > 0)
        s = no_scores
        if EARLY:
            s = warpgroup_mma_wait(0, [warpgroup_mma(
                k_left, _rows(q_ring, 0).permute([1, 0]), no_scores, use_acc=False, is_async=True
            )])
        for i in range(total):
            slot, after, at = i % STAGES, (i + 1) % STAGES, _turned(i, start, total)
            q_tile, do_tile = _rows(q_ring, slot), _rows(do_ring, slot)
            if not EARLY:
                s = warpgroup_mma(k_left, q_tile.permute([1, 0]), no_scores, use_acc=False, is_async=True)
            if not HALF:
                dp = warpgroup_mma(v_left, do_tile.permute([1, 0]), no_scores, use_acc=False, is_async=True)
            if not EARLY:
                if HALF:  # the scores leave the registers before dP takes as many
                    s = warpgroup_mma_wait(0, [s])
                else:
                    s = warpgroup_mma_wait(1, [s])
            p = _probabilities(
                s, lse_ring.index(slot), scale_log2, first_row, at, masked, seen_from, BLOCK_M, score_layout
            )
            if HALF:
                p = p.to(dtype)
                dp = warpgroup_mma(v_left, do_tile.permute([1, 0]), no_scores, use_acc=False, is_async=True)
            p_left = gl.convert_layout(p.to(dtype), left_layout)
            dv_sum = warpgroup_mma(p_left, do_tile, dv_sum, is_async=True)
            dp = warpgroup_mma_wait(1, [dp])
            row_delta = delta_ring.index(slot).reshape([BLOCK_M]).load(gl.SliceLayout(0, score_layout))
            ds = (_wide(p) * (dp - row_delta[None, :])).to(dtype)
            ds_tile.store(ds)
            fence_async_shared()
            tma.store_wait(0)  # dQ of i - 1 has been read
            if EARLY:
                mbarrier.wait(filled.index(after), (i + 1) // STAGES & 1, pred=i + 1 < total)
            _barrier()
            dq = warpgroup_mma(ds_tile.permute([1, 0]), k_tile, no_dq, use_acc=False, is_async=True)
            ds_left = gl.convert_layout(ds, left_layout)
            dk_sum = warpgroup_mma(ds_left, q_tile, dk_sum, is_async=True)
            if EARLY:  # after the last tile, of what is there
                s = warpgroup_mma(k_left, _rows(q_ring, after).permute([1, 0]), no_scores, use_acc=False, is_async=True)
                dq, dv_sum, p_left = warpgroup_mma_wait(2, [dq, dv_sum, p_left])
            else:
                dq, dv_sum, p_left = warpgroup_mma_wait(1, [dq, dv_sum, p_left])
            dq_tile.reshape([BLOCK_M, D]).store(dq)
            fence_async_shared()
            mbarrier.arrive(emptied.index((i + STAGES - 1) % STAGES), count=1, pred=i > 0)
            _barrier()  # every warp is done with dQ, and so with dS
            if ADD:
                _reduce_add(dq_desc, [head, first_row + at * BLOCK_M, 0], dq_tile)
            if EARLY:
                s, dk_sum, ds_left = warpgroup_mma_wait(0, [s, dk_sum, ds_left])
            else:
                mbarrier.wait(filled.index(after), (i + 1) // STAGES & 1, pred=i + 1 < total)
                dk_sum, ds_left = warpgroup_mma_wait(0, [dk_sum, ds_left])
    else:
        mbarrier.wait(filled.index(0), 0)
        s = warpgroup_mma(k_tile, _rows(q_ring, 0).permute([1, 0]), no_scores, use_acc=False, is_async=True)
        dp = warpgroup_mma(v_tile, _rows(do_ring, 0).permute([1, 0]), no_scores, use_acc=False, is_async=True)
        s, dp = warpgroup_mma_wait(0, [s, dp])
        p = _probabilities(s, lse_ring.index(0), scale_log2, first_row, start, masked, seen_from, BLOCK_M, score_layout)
        if HALF:
            p = p.to(dtype)
        mbarrier.wait(filled.index(1), 0, pred=total > 0)
        for i in range(total):
            slot, after, at = i % STAGES, (i + 1) % STAGES, _turned(i + 1, start, total)
            q_tile, do_tile = _rows(q_ring, slot), _rows(do_ring, slot)
            p_left = gl.convert_layout(p.to(dtype), left_layout)
            tma.store_wait(0)  # dQ of i - 2 has been read
            _barrier()  # every warp is done with dQ of i - 1, and so with its dS and its buffers
            dv_sum = warpgroup_mma(p_left, do_tile, dv_sum, is_async=True)
            dq_tile.reshape([BLOCK_M, D]).store(dq)
            row_delta = delta_ring.index(slot).reshape([BLOCK_M]).load(gl.SliceLayout(0, score_layout))
            ds = (_wide(p) * (dp - row_delta[None, :])).to(dtype)
            ds_tile.store(ds)
            fence_async_shared()
            mbarrier.arrive(emptied.index((i + STAGES - 1) % STAGES), count=1, pred=i > 0)
            _barrier()
            _reduce_add(dq_desc, [head, first_row + _turned(gl.maximum(i - 1, 0), start, total) * BLOCK_M, 0], dq_tile)
            s = warpgroup_mma(k_tile, _rows(q_ring, after).permute([1, 0]), no_scores, use_acc=False, is_async=True)
            ds_left = gl.convert_layout(ds, left_layout)
            dk_sum = warpgroup_mma(ds_left, q_tile, dk_sum, is_async=True)
            dq = warpgroup_mma(ds_tile.permute([1, 0]), k_tile, no_dq, use_acc=False, is_async=True)
            dp = warpgroup_mma(v_tile, _rows(do_ring, after).permute([1, 0]), no_scores, use_acc=False, is_async=True)
            s, dv_sum, p_left = warpgroup_mma_wait(3, [s, dv_sum, p_left])
            p = _probabilities(
                s, lse_ring.index(after), scale_log2, first_row, at, masked, seen_from, BLOCK_M, score_layout
            )
            if HALF:
                p = p.to(dtype)
            mbarrier.wait(filled.index((i + 2) % STAGES), (i + 2) // STAGES & 1, pred=i + 1 < total)
            dp, dq, dk_sum, ds_left = warpgroup_mma_wait(0, [dp, dq, dk_sum, ds_left])
        tma.store_wait(0)
        _barrier()
        dq_tile.reshape([BLOCK_M, D]).store(dq)
        fence_async_shared()
        _barrier()
        _reduce_add(dq_desc, [head, first_row + _turned(gl.maximum(total - 1, 0), start, total) * BLOCK_M, 0], dq_tile)
    tma.store_wait(0)

    keys_of_sums = first_key + gl.arange(0, 64, layout=gl.SliceLayout(1, sum_layout))
    columns_of_sums = gl.arange(0, D, layout=gl.SliceLayout(0, sum_layout))
    offsets = (b64 * M * H + h64) * D + keys_of_sums.to(gl.int64)[:, None] * (H * D) + columns_of_sums[None, :]
    gl.store(dk + offsets, (dk_sum * scale).to(dtype), mask=(keys_of_sums < M)[:, None])
    gl.store(dv + offsets, dv_sum.to(dtype), mask=(keys_of_sums < M)[:, None])


@gluon.jit
def _wide(p):
    """p in fp32. Of bf16 by an assembly that takes pairs: else the compiler keeps each in a register of its own."""
    if p.dtype == gl.bfloat16:
        p = gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [p], dtype=gl.float32, is_pure=True, pack=2
        )
    return p.to(gl.float32)


@gluon.jit
def _turned(i, start, total):
    """The i-th tile of a walk in a circle."""
    i += start
    return gl.where(i >= total, i - total, i)


@gluon.jit
def _rows(ring, slot):
    return ring.index(slot).reshape([ring.shape[3], ring.shape[4]])



def takes(q: Tensor, k: Tensor, deterministic: bool) -> bool:
    """Whether launch_backward has a kernel for these; the plain one has for all."""
    return (
        q.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] in (32, 64)
        and q.shape[2] == k.shape[2]
        and not deterministic
    )


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
    deterministic: bool = False,
    block_m: int = 64,
    stages: int = 4,
    early: bool = True,
    add: str = "late",
    block_n: int = 128,
    num_warps: int = 8,
    consumers: int = 0,
    consumer_registers: int = 0,
    lean: bool = False,
    half: bool = True,
    turn: int = 0,
    keys_in_registers: bool = False,
    max_registers: int = 255,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) from what launch_forward took and gave."""
    B, N, H, D = q.shape
    M = k.shape[1]
    q, k, v, out, d_out = (_copyable(x) for x in (q, k, v, out, d_out))
    mask, _ = mask_and_tiles(key_mask, None, q)
    causal_block = binding_causal_block(causal_block, N, M)
    row_length = -(-N // 4) * 4  # the copy engine's strides are multiples of 16 bytes
    row_lse, row_delta = lse.new_empty(B * H * 4, row_length), lse.new_empty(B * H * 4, row_length)
    sum_rows = N + block_m  # the last tile of a walk may end past N
    dq_sum = lse.new_zeros(B, H, sum_rows, D)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    dtype = gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16
    tile_layout = gl.NVMMASharedLayout.get_default_for([1, 1, block_m, D], dtype)
    row_layout = gl.NVMMASharedLayout.get_default_for([1, block_m], gl.float32)
    q_desc, do_desc = (
        TensorDescriptor(x, [B, H, N, D], [x.stride(i) for i in (0, 2, 1, 3)], [1, 1, block_m, D], tile_layout)
        for x in (q, d_out)
    )
    lse_desc, delta_desc = (
        TensorDescriptor(x, [B * H * 4, row_length], [row_length, 1], [1, block_m], row_layout) for x in (row_lse, row_delta)
    )
    sum_layout = gl.NVMMASharedLayout.get_default_for([1, block_m, D], gl.float32)
    dq_desc = TensorDescriptor(dq_sum, [B * H, sum_rows, D], [sum_rows * D, D, 1], [1, block_m, D], sum_layout)
    with torch.cuda.device_of(q):
        _row_statistics_kernel[(triton.cdiv(row_length + 3, 128) * B * H,)](
            out, d_out, lse, row_lse, row_delta, *out.stride()[:3], *d_out.stride()[:3], N, H, row_length,
            D=D, BLOCK_M=128, num_warps=4,
        )  # fmt: skip
        if consumers:
            _flash_bwd_specialised_kernel[(triton.cdiv(M, 64 * consumers) * B * H,)](
                q_desc, do_desc, lse_desc, delta_desc, dq_desc, k, v, dk, dv, mask, *k.stride()[:3], *v.stride()[:3],
                B, N, M, H, causal_block or 1, softmax_scale, softmax_scale * math.log2(math.e),
                heads_in_l2(N * D * (2 * q.element_size() + 4), B * H), turn,
                D=D, BLOCK_M=block_m, CONSUMERS=consumers, CONSUMER_REGISTERS=consumer_registers, STAGES=stages,
                LEAN=lean, HALF=half, ADD=add != "none", KEYS_IN_REGISTERS=keys_in_registers, EARLY=early, CAUSAL=causal_block is not None, HAS_MASK=key_mask is not None,
                num_warps=4, maxnreg=max_registers, enable_fp_fusion=True,
            )  # fmt: skip
        else:
            _flash_bwd_hopper_kernel[(triton.cdiv(M, block_n) * B * H,)](
                q_desc, do_desc, lse_desc, delta_desc, dq_desc, k, v, dq_sum, dk, dv, mask, *k.stride()[:3], *v.stride()[:3],
                B, N, M, H, sum_rows, causal_block or 1, softmax_scale, softmax_scale * math.log2(math.e),
                heads_in_l2(N * D * (2 * q.element_size() + 4), B * H),
                D=D, BLOCK_M=block_m, BLOCK_N=block_n, STAGES=stages, EARLY=early, ADD=add,
                CAUSAL=causal_block is not None, HAS_MASK=key_mask is not None,
                num_warps=num_warps, maxnreg=255, enable_fp_fusion=True,
            )  # fmt: skip
        torch.mul(dq_sum[:, :, :N].transpose(1, 2), softmax_scale, out=dq)
    return dq, dk, dv


def _copyable(x: Tensor) -> Tensor:
    """x as the copy engine wants it: as `addressable` gives it, and no row twice."""
    x = addressable(x)
    return x if all(x.stride()) else x.clone(memory_format=torch.contiguous_format)
