# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of Gluon's functions are pointers, tiles and integers, which have no Python types)
"""launch_forward_hopper: flash_attention's forward pass for sm_90, in which the softmax overlaps the tensor cores.

The mathematics, the order of the key tiles and the results are those of forward.py. What differs is who waits for whom.
There, a product whose result is read is waited for at once. Here (Shah et al., "FlashAttention-3", 2024, section 3.2) the
scores of key tile j and the product of the weights of tile j - 1 with its values are issued together, and the softmax of
tile j runs while the second of them does:

    issue S = Q K_j^T
    issue O += P_(j-1) V_(j-1)
    wait for S;  m, P_j, l           the tensor cores work on O
    wait for O;  O *= 2^(m_old - m)

Key and value tiles come by TMA into a ring of buffers, each with a barrier in shared memory. Either the program's first
thread asks for a tile, one tile after the buffer's last use; or, with `consumers`, the program consists of so many
warpgroups of 64 queries each, which only multiply, and of four warps of few registers, which only ask for tiles.

Tiles that need a mask come last. TMA writes 0 past the last key; padding keys, whose values may be NaN, are set to 0 in
the buffer. Bytes and dtypes as in forward.py; bf16 and fp16, D of HEAD_DIMS.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
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
    mask_and_tiles,
    tile_and_head,
)
from trunkline.kernels.attention.key_tiles import nth_tile, tiles_to_visit
from trunkline.kernels.triton_path import triton

HEAD_DIMS = (32, 64, 128)
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name in Triton 3.6


class HopperTile(NamedTuple):
    block_m: int  # queries
    block_n: int  # keys
    num_stages: int  # key and value tiles in shared memory
    max_registers: int  # a thread; with consumers, at the start
    consumers: int = 0  # warpgroups of 64 queries each, beside four warps that load; 0: all warps do everything
    consumer_registers: int = 0
    q_in_registers: bool = False

    @property
    def num_warps(self) -> int:
        """Of the launch: with consumers, the ones that load."""
        return 4 if self.consumers else self.block_m // 16

    @property
    def q_rows(self) -> int:
        """Of a tile of q in shared memory."""
        return 64 if self.consumers else self.block_m


@gluon.jit(do_not_specialize=["B", "N", "M", "Hq", "group", "causal_block", "heads_at_once"])
def _flash_fwd_hopper_kernel(
    q, k, v, out, lse, key_mask, key_tiles,
    B, N, M, Hq, group, causal_block, scale_log2, heads_at_once,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, HAS_MASK: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr, CONSUMERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    Q_ROWS: gl.constexpr = q.block_shape[2]
    BLOCK_N: gl.constexpr = k.block_shape[2]
    D: gl.constexpr = k.block_shape[3]
    Q_TILES: gl.constexpr = BLOCK_M // Q_ROWS

    tile, head = tile_and_head(gl.cdiv(N, BLOCK_M), B * Hq, heads_at_once)
    tile = gl.cdiv(N, BLOCK_M) - 1 - tile  # the last queries see the most keys: they start first
    b, h = head // Hq, head % Hq
    first_row = tile * BLOCK_M
    seen_by_all, seen_by_any = M, M
    if CAUSAL:
        last_row = gl.minimum(first_row + BLOCK_M, N) - 1
        seen_by_all = gl.minimum((first_row // causal_block + 1) * causal_block, M)
        seen_by_any = gl.minimum((last_row // causal_block + 1) * causal_block, M)
    key_mask += b.to(gl.int64) * M
    key_tiles += b.to(gl.int64) * 3 * (gl.cdiv(M, BLOCK_N) + 1)
    whole, total, gap_at, gap = tiles_to_visit(key_tiles, seen_by_all, seen_by_any, M, BLOCK_N, HAS_MASK)

    q_tiles = gl.allocate_shared_memory(q.dtype, [Q_TILES, 1, 1, Q_ROWS, D], q.layout)
    k_ring = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BLOCK_N, D], k.layout)
    v_ring = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BLOCK_N, D], v.layout)
    q_filled = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    emptied = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_filled, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(filled.index(stage), count=1)
        mbarrier.init(emptied.index(stage), count=CONSUMERS if CONSUMERS > 0 else 1)
    fence_async_shared()
    _barrier()

    mbarrier.expect(q_filled, BLOCK_M * D * 2)
    for part in gl.static_range(Q_TILES):
        tma.async_copy_global_to_shared(q, [b, h, first_row + part * Q_ROWS, 0], q_filled, q_tiles.index(part))
    ring = (k, v, b, h // group, k_ring, v_ring, filled, emptied, key_tiles, whole, total, gap_at, gap)
    rest = (out, lse, key_mask, h, N, M, Hq, causal_block, scale_log2)
    if CONSUMERS == 0:
        _attend(q_tiles.index(0), q_filled, first_row, ring, rest, CAUSAL, HAS_MASK, Q_IN_REGISTERS, False)
    else:
        gl.static_assert(CONSUMERS == Q_TILES)
        if CONSUMERS == 2:
            gl.warp_specialize([
                (_load_tiles, (ring, HAS_MASK)),
                (_attend, (q_tiles.index(0), q_filled, first_row, ring, rest, CAUSAL, HAS_MASK, Q_IN_REGISTERS, True)),
                (_attend, (q_tiles.index(1), q_filled, first_row + 64, ring, rest, CAUSAL, HAS_MASK, Q_IN_REGISTERS, True)),
            ], [4, 4], [CONSUMER_REGISTERS, CONSUMER_REGISTERS])  # fmt: skip
        elif CONSUMERS == 3:
            gl.warp_specialize([
                (_load_tiles, (ring, HAS_MASK)),
                (_attend, (q_tiles.index(0), q_filled, first_row, ring, rest, CAUSAL, HAS_MASK, Q_IN_REGISTERS, True)),
                (_attend, (q_tiles.index(1), q_filled, first_row + 64, ring, rest, CAUSAL, HAS_MASK, Q_IN_REGISTERS, True)),
                (_attend, (q_tiles.index(2), q_filled, first_row + 128, ring, rest, CAUSAL, HAS_MASK, Q_IN_REGISTERS, True)),
            ], [4, 4, 4], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, CONSUMER_REGISTERS])  # fmt: skip
        else:
            gl.warp_specialize([
                (_load_tiles, (ring, HAS_MASK)),
                (_attend, (q_tiles.index(0), q_filled, first_row, ring, rest, CAUSAL, HAS_MASK, Q_IN_REGISTERS, True)),
                (_attend, (q_tiles.index(1), q_filled, first_row + 64, ring, rest, CAUSAL, HAS_MASK, Q_IN_REGISTERS, True)),
                (_attend, (q_tiles.index(2), q_filled, first_row + 128, ring, rest, CAUSAL, HAS_MASK, Q_IN_REGISTERS, True)),
                (_attend, (q_tiles.index(3), q_filled, first_row + 192, ring, rest, CAUSAL, HAS_MASK, Q_IN_REGISTERS, True)),
            ], [4, 4, 4, 4], [CONSUMER_REGISTERS] * 4)  # fmt: skip


@gluon.jit
def _load_tiles(ring, HAS_MASK: gl.constexpr):
    """What the warps do that load: each tile as soon as its buffer is empty."""
    k, v, b, h, k_ring, v_ring, filled, emptied, key_tiles, whole, total, gap_at, gap = ring
    STAGES: gl.constexpr = k_ring.shape[0]
    tile = _tile_ahead(key_tiles, 0, total, gap_at, gap, HAS_MASK)
    for i in range(total):
        upcoming = _tile_ahead(key_tiles, i + 1, total, gap_at, gap, HAS_MASK)
        mbarrier.wait(emptied.index(i % STAGES), (i // STAGES & 1) ^ 1)
        _fill(i, tile, True, k, v, b, h, k_ring, v_ring, filled)
        tile = upcoming


@gluon.jit
def _attend(
    q_buffer, q_filled, first_row, ring, rest,
    CAUSAL: gl.constexpr, HAS_MASK: gl.constexpr, Q_IN_REGISTERS: gl.constexpr, SPECIALISED: gl.constexpr,
):  # fmt: skip
    """What the others do, or all: attention of one tile of queries to all tiles of keys that it sees."""
    k, v, b, kv_head, k_ring, v_ring, filled, emptied, key_tiles, whole, total, gap_at, gap = ring
    out, lse, key_mask, h, N, M, Hq, causal_block, scale_log2 = rest
    STAGES: gl.constexpr = k_ring.shape[0]
    BLOCK_N: gl.constexpr = k_ring.shape[3]
    BLOCK_M: gl.constexpr = q_buffer.shape[2]
    D: gl.constexpr = q_buffer.shape[3]
    WARPS: gl.constexpr = gl.num_warps()
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUTPUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    dtype: gl.constexpr = v_ring.dtype

    rows = first_row + gl.arange(0, BLOCK_M, layout=ROWS)
    row_end = gl.minimum(rows + M, M)
    if CAUSAL:
        row_end = gl.minimum((rows // causal_block + 1) * causal_block, M)
    upcoming = 0
    if not SPECIALISED:
        for early in gl.static_range(STAGES - 1):
            tile = _tile_ahead(key_tiles, early, total, gap_at, gap, HAS_MASK)
            _fill(early, tile, early < total, k, v, b, kv_head, k_ring, v_ring, filled)
        upcoming = _tile_ahead(key_tiles, STAGES - 1, total, gap_at, gap, HAS_MASK)
    mbarrier.wait(q_filled, 0)
    q_tile = q_buffer.reshape([BLOCK_M, D])
    if Q_IN_REGISTERS:
        q_tile = q_tile.load(gl.DotOperandLayout(0, SCORES, 2))

    # the lowest finite number, so that a row that has seen no key yet makes no NaN of -inf - -inf
    m = gl.full([BLOCK_M], -3.4028234663852886e38, gl.float32, ROWS)
    l = _sum_in_thread(gl.zeros([BLOCK_M, BLOCK_N], gl.float32, SCORES))  # noqa: E741
    acc = gl.zeros([BLOCK_M, D], gl.float32, OUTPUT)
    if whole > 0:
        mbarrier.wait(filled.index(0), 0)
        s = warpgroup_mma_wait(0, [_scores(q_tile, k_ring, 0, BLOCK_M, SCORES)])
        m, l, weights, shrink = _softmax(s, m, l, scale_log2)
        p = _operand(weights, dtype, OUTPUT)
        mbarrier.wait(filled.index(1 % STAGES), 0, pred=whole > 1)
        for i in range(1, whole):
            s = _scores(q_tile, k_ring, i, BLOCK_M, SCORES)
            acc = warpgroup_mma(p, _tile(v_ring, i - 1), acc, is_async=True)
            if not SPECIALISED:
                _barrier()  # all warps have seen the end of the products of tile i - 2
                _fill(i + STAGES - 2, upcoming, i + STAGES - 2 < total, k, v, b, kv_head, k_ring, v_ring, filled)
                upcoming = _tile_ahead(key_tiles, i + STAGES - 1, total, gap_at, gap, HAS_MASK)
            s = warpgroup_mma_wait(1, [s])
            m, l, weights, shrink = _softmax(s, m, l, scale_log2)
            l = _pin(l)  # noqa: E741
            # waited for here, since the assembler moves no wait for a product across this one, up to where the scores
            # are read; and the weights are among what is waited for lest the compiler move the exponentials down
            mbarrier.wait(filled.index((i + 1) % STAGES), (i + 1) // STAGES & 1, pred=i + 1 < whole)
            acc, weights, shrink = warpgroup_mma_wait(0, [acc, weights, shrink])
            if SPECIALISED:
                mbarrier.arrive(emptied.index((i - 1) % STAGES), count=1)
            acc *= gl.convert_layout(shrink, OUTPUT_ROWS, assert_trivial=True)[:, None]
            p = _operand(weights, dtype, OUTPUT)
        acc = warpgroup_mma(p, _tile(v_ring, whole - 1), acc)
        if SPECIALISED:
            mbarrier.arrive(emptied.index((whole - 1) % STAGES), count=1)

    for i in range(whole, total):
        mbarrier.wait(filled.index(i % STAGES), i // STAGES & 1)
        s = _scores(q_tile, k_ring, i, BLOCK_M, SCORES)
        if not SPECIALISED:
            _barrier()
            if i > 0:
                _fill(i + STAGES - 2, upcoming, i + STAGES - 2 < total, k, v, b, kv_head, k_ring, v_ring, filled)
                upcoming = _tile_ahead(key_tiles, i + STAGES - 1, total, gap_at, gap, HAS_MASK)
        first_key = nth_tile(key_tiles, i, gap_at, gap, HAS_MASK) * BLOCK_N
        if HAS_MASK:
            _zero_padding(_tile(v_ring, i), key_mask + first_key, M - first_key)
        keys = first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
        real = keys < M
        if HAS_MASK:
            real = gl.load(key_mask + keys, mask=real, other=0) != 0
        s = warpgroup_mma_wait(0, [s])
        s = gl.where(gl.where(real, keys, M)[None, :] < row_end[:, None], s, float("-inf"))
        m, l, weights, shrink = _softmax(s, m, l, scale_log2)
        acc *= gl.convert_layout(shrink, OUTPUT_ROWS, assert_trivial=True)[:, None]
        acc = warpgroup_mma(_operand(weights, dtype, OUTPUT), _tile(v_ring, i), acc)
        if SPECIALISED:
            mbarrier.arrive(emptied.index(i % STAGES), count=1)

    l = gl.convert_layout(gl.sum(l, 1), ROWS)  # noqa: E741
    sees_none = l == 0
    acc *= gl.convert_layout(1.0 / gl.where(sees_none, 1.0, l), OUTPUT_ROWS, assert_trivial=True)[:, None]
    head = b.to(gl.int64) * Hq + h
    gl.store(lse + head * N + rows, gl.where(sees_none, float("inf"), m + gl.log2(l)), mask=rows < N)
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    in_tile = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, STORED))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, STORED))
    start = out + ((b.to(gl.int64) * N + first_row) * Hq + h) * D
    result = gl.convert_layout(acc.to(dtype), STORED)
    gl.store(start + (in_tile[:, None] * (Hq * D) + columns[None, :]), result, mask=(first_row + in_tile < N)[:, None])


@gluon.jit
def _tile_ahead(key_tiles, i, total, gap_at, gap, HAS_MASK: gl.constexpr):
    """The i-th key tile to visit, or any tile past the last."""
    return nth_tile(key_tiles, gl.minimum(i, gl.maximum(total - 1, 0)), gap_at, gap, HAS_MASK)


@gluon.jit
def _fill(i, tile, asked, k, v, b, h, k_ring, v_ring, filled):
    """Asks for a key tile and its values as the i-th of the ring."""
    STAGES: gl.constexpr = k_ring.shape[0]
    BLOCK_N: gl.constexpr = k_ring.shape[3]
    D: gl.constexpr = k_ring.shape[4]
    stage = i % STAGES
    barrier = filled.index(stage)
    mbarrier.expect(barrier, 2 * BLOCK_N * D * 2, pred=asked)
    tma.async_copy_global_to_shared(k, [b, h, tile * BLOCK_N, 0], barrier, k_ring.index(stage), pred=asked)
    tma.async_copy_global_to_shared(v, [b, h, tile * BLOCK_N, 0], barrier, v_ring.index(stage), pred=asked)


@gluon.jit
def _tile(ring, i):
    return ring.index(i % ring.shape[0]).reshape([ring.shape[3], ring.shape[4]])


@gluon.jit
def _scores(q_tile, k_ring, i, BLOCK_M: gl.constexpr, SCORES: gl.constexpr):
    s = gl.full([BLOCK_M, k_ring.shape[3]], 0.0, gl.float32, SCORES)
    return warpgroup_mma(q_tile, _tile(k_ring, i).permute([1, 0]), s, use_acc=False, is_async=True)


@gluon.jit
def _softmax(s, m, l, scale_log2):  # noqa: E741
    """(m, l, p, shrink) with the scores s; shrink is what the sums so far shrink by."""
    m_new = gl.maximum(m, gl.max(s, 1) * scale_log2)
    p = gl.exp2(s * scale_log2 - m_new[:, None])
    shrink = gl.exp2(m - m_new)
    added = _sum_in_thread(p)
    l = l * gl.convert_layout(shrink, gl.SliceLayout(1, added.type.layout))[:, None] + added  # noqa: E741
    return m_new, l, p, shrink


@gluon.jit
def _sum_in_thread(x):
    """[M, 4] of [M, N]: the sums of what each of a row's four threads holds of it."""
    parts = x.reshape([x.shape[0], x.shape[1] // 8, 4, 2])
    return gl.sum(gl.sum(parts, 3), 1)


@gluon.jit
def _pin(x):
    """x, known before whatever follows with an effect. The condition is never true, which the assembler cannot know."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred never;
        setp.lt.f32 never, $2, 0fBF800000;
        setp.lt.or.f32 never, $3, 0fBF800000, never;
        @never nanosleep.u32 1;
        mov.b32 $0, $2;
        mov.b32 $1, $3;
        }""",
        "=r,=r,r,r", [x], dtype=gl.float32, is_pure=False, pack=2,
    )  # fmt: skip


@gluon.jit
def _operand(p, dtype: gl.constexpr, OUTPUT: gl.constexpr):
    """p as the left operand of a product, which it is without leaving its registers."""
    return gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, OUTPUT, 2), assert_trivial=True)


@gluon.jit
def _zero_padding(values, mask, num_keys):
    """Rows of padding become 0, whatever they held. Consumers that share the tile may all do so: they write the same."""
    BLOCK_N: gl.constexpr = values.shape[0]
    D: gl.constexpr = values.shape[1]
    AT_ONCE: gl.constexpr = 256 // D * gl.num_warps()
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    for first in gl.static_range(0, BLOCK_N, AT_ONCE):
        keys = first + gl.arange(0, AT_ONCE, layout=gl.SliceLayout(1, LAYOUT))
        real = gl.load(mask + keys, mask=keys < num_keys, other=0) != 0
        part = values.slice(first, AT_ONCE)
        loaded = part.load(LAYOUT)
        part.store(gl.where(real[:, None], loaded, gl.zeros_like(loaded)))
    fence_async_shared()
    _barrier()


def launch_forward_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    causal_block: int | None,
    softmax_scale: float,
    tile: HopperTile,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of checked arguments with at least one query and one key, 16-bit, D of HEAD_DIMS."""
    B, N, Hq, D = q.shape
    M, Hkv = k.shape[1:3]
    q, k, v = (_describable(x) for x in (q, k, v))
    out = q.new_empty(q.shape)
    lse = torch.empty(B, Hq, N, dtype=torch.float32, device=q.device)
    mask, key_tiles = mask_and_tiles(key_mask, tile.block_n, q)
    causal_block = binding_causal_block(causal_block, N, M)
    group = Hq // Hkv
    with torch.cuda.device_of(q):  # Triton launches on the current one
        _flash_fwd_hopper_kernel[(triton.cdiv(N, tile.block_m) * B * Hq,)](
            _descriptor(q, tile.q_rows), _descriptor(k, tile.block_n), _descriptor(v, tile.block_n),
            out, lse, mask, key_tiles,
            B, N, M, Hq, group, causal_block or 0, softmax_scale * math.log2(math.e),
            group * heads_in_l2(2 * M * D * k.element_size(), B * Hkv),
            BLOCK_M=tile.block_m, STAGES=tile.num_stages,
            CAUSAL=causal_block is not None, HAS_MASK=key_mask is not None,
            Q_IN_REGISTERS=tile.q_in_registers, CONSUMERS=tile.consumers, CONSUMER_REGISTERS=tile.consumer_registers,
            num_warps=tile.num_warps, maxnreg=tile.max_registers,
        )  # fmt: skip
    return out, lse


def _descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """Of x [B, N, H, D] as [B, H, N, D], for tiles of `block` rows of a head; past the last row it reads 0."""
    x = x.transpose(1, 2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, block, x.shape[3]], shared_layout(x.shape[3]))


def shared_layout(head_dim: int) -> gl.NVMMASharedLayout:
    """Of a tile of 16-bit rows, as TMA writes it and the tensor cores read it."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(2 * head_dim, 128), element_bitwidth=16, rank=4)


def _describable(x: Tensor) -> Tensor:
    """x as TMA can read it: all that `addressable` sees to, and no dimension expanded."""
    x = addressable(x)
    expanded = any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.clone(memory_format=torch.contiguous_format) if expanded else x
