# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of Gluon's functions are pointers, tiles and integers, which have no Python types)
"""launch_forward_hopper: flash_attention's forward pass for sm_90, in which the softmax overlaps the tensor cores.

The mathematics, the order of the key tiles, bytes and dtypes are those of forward.py; inputs are bf16 or fp16. What
differs is who waits for whom. A program has four warps that load and three consumers. A consumer is a warpgroup, four
warps, that computes attention of 64 queries.

The warps that load ask the tensor memory accelerator (TMA) for tiles of keys and values, which it puts into a ring of
buffers in shared memory. Each buffer has two barriers: one says that it is filled, the other that all consumers are
done with it. Tiles that need a mask come last. For each of these the same warps write down which of its keys may be
seen, and set the values of padding, which may be NaN, to 0. Past the last key TMA writes 0 itself.

A consumer issues the scores of key tile j together with the product of the weights of tile j - 1 with its values. Its
softmax of tile j runs while the second product does (Shah et al., "FlashAttention-3", 2024, section 3.2):

    issue S = Q K_j^T
    issue O += P_(j-1) V_(j-1)
    wait for S;  m, P_j, l           the tensor cores work on O
    wait for O;  O *= 2^(m_old - m)

With D > 32 consumers issue in turn (section 3.1), so that the softmax of one runs during the products of the others.
With D = 32 exponentials take longer than products, and nothing is gained from that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from trunkline.kernels.attention.forward import (
    binding_causal_block,
    heads_in_l2,
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
from trunkline.kernels.attention.key_tiles import nth_tile, tiles_to_visit
from trunkline.kernels.attention.tiles import HOPPER_FORWARD
from trunkline.kernels.triton_path import triton

CONSUMER_ROWS = gl.constexpr(64)  # queries of a consumer


@gluon.jit(do_not_specialize=["B", "N", "M", "Hq", "group", "causal_block", "heads_at_once"])
def _flash_fwd_hopper_kernel(
    q, k, v, out, lse, key_mask, key_tiles,
    B, N, M, Hq, group, causal_block, scale_log2, heads_at_once,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, HAS_MASK: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = CONSUMERS * CONSUMER_ROWS
    BLOCK_N: gl.constexpr = k.block_shape[2]
    D: gl.constexpr = k.block_shape[3]

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

    q_tiles = gl.allocate_shared_memory(q.dtype, [CONSUMERS, 1, 1, CONSUMER_ROWS, D], q.layout)
    k_ring = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BLOCK_N, D], k.layout)
    v_ring = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BLOCK_N, D], v.layout)
    limits = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_filled = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    landed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    emptied = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_filled, count=1)
    mbarrier.init(landed, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(filled.index(stage), count=1)
        mbarrier.init(emptied.index(stage), count=CONSUMERS)
    for consumer in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(consumer), count=1)
    fence_async_shared()
    barrier()

    mbarrier.expect(q_filled, BLOCK_M * D * 2)
    for part in gl.static_range(CONSUMERS):
        async_load(q, [b, h, first_row + part * CONSUMER_ROWS, 0], q_filled, q_tiles.index(part))
    ring = (k_ring, v_ring, limits, filled, emptied, whole, total)
    tiles = (k, v, b, h // group, key_mask, key_tiles, gap_at, gap, M)
    rest = (q_filled, turns, out, lse, b, h, N, M, Hq, causal_block, scale_log2)
    gl.warp_specialize([
        (_load_tiles, (ring, tiles, landed, HAS_MASK)),
        (_attend, (0, q_tiles.index(0), first_row, ring, rest, CAUSAL)),
        (_attend, (1, q_tiles.index(1), first_row + CONSUMER_ROWS, ring, rest, CAUSAL)),
        (_attend, (2, q_tiles.index(2), first_row + 2 * CONSUMER_ROWS, ring, rest, CAUSAL)),
    ], [4, 4, 4], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, CONSUMER_REGISTERS])  # fmt: skip


@gluon.jit
def _load_tiles(ring, tiles, landed, HAS_MASK: gl.constexpr):
    """What the warps do that load: each tile as soon as its buffer is empty."""
    k_ring, v_ring, limits, filled, emptied, whole, total = ring
    k, v, b, h, key_mask, key_tiles, gap_at, gap, M = tiles
    STAGES: gl.constexpr = k_ring.shape[0]
    BLOCK_N: gl.constexpr = k_ring.shape[3]
    last = gl.maximum(total - 1, 0)
    first_key = nth_tile(key_tiles, 0, gap_at, gap, HAS_MASK) * BLOCK_N
    for i in range(total):
        upcoming = nth_tile(key_tiles, gl.minimum(i + 1, last), gap_at, gap, HAS_MASK) * BLOCK_N
        stage = i % STAGES
        mbarrier.wait(emptied.index(stage), (i // STAGES & 1) ^ 1)
        if i < whole:
            _ask(k, v, b, h, first_key, k_ring.index(stage), v_ring.index(stage), filled.index(stage))
        else:
            _ask(k, v, b, h, first_key, k_ring.index(stage), v_ring.index(stage), landed)
            _limit(limits.index(stage), key_mask, first_key, M, HAS_MASK)
            mbarrier.wait(landed, i - whole & 1)
            if HAS_MASK:
                _zero_padding(_tile(v_ring, i), key_mask + first_key, M - first_key)
            barrier()
            mbarrier.arrive(filled.index(stage), count=1)
        first_key = upcoming


@gluon.jit
def _ask(k, v, b, h, first_key, k_buffer, v_buffer, landing):
    """For a key tile and its values."""
    mbarrier.expect(landing, 2 * k_buffer.shape[2] * k_buffer.shape[3] * 2)
    async_load(k, [b, h, first_key, 0], landing, k_buffer)
    async_load(v, [b, h, first_key, 0], landing, v_buffer)


@gluon.jit
def _limit(limits, key_mask, first_key, M, HAS_MASK: gl.constexpr):
    """Of each key of a tile: its own number, or M if no query may see it."""
    keys = first_key + gl.arange(0, limits.shape[0], layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    real = keys < M
    if HAS_MASK:
        real = gl.load(key_mask + keys, mask=real, other=0) != 0
    limits.store(gl.where(real, keys, M))


@gluon.jit
def _zero_padding(values, key_mask, num_keys):
    BLOCK_N: gl.constexpr = values.shape[0]
    D: gl.constexpr = values.shape[1]
    AT_ONCE: gl.constexpr = 256 // D * gl.num_warps()
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [gl.num_warps(), 1], [1, 0])
    for first in gl.static_range(0, BLOCK_N, AT_ONCE):
        keys = first + gl.arange(0, AT_ONCE, layout=gl.SliceLayout(1, LAYOUT))
        real = gl.load(key_mask + keys, mask=keys < num_keys, other=0) != 0
        part = values.slice(first, AT_ONCE)
        loaded = part.load(LAYOUT)
        part.store(gl.where(real[:, None], loaded, gl.zeros_like(loaded)))
    fence_async_shared()


@gluon.jit
def _attend(which: gl.constexpr, q_buffer, first_row, ring, rest, CAUSAL: gl.constexpr):
    """What a consumer does: attention of its queries to all tiles of keys that any of the program's sees."""
    k_ring, v_ring, limits, filled, emptied, whole, total = ring
    q_filled, turns, out, lse, b, h, N, M, Hq, causal_block, scale_log2 = rest
    STAGES: gl.constexpr = k_ring.shape[0]
    BLOCK_N: gl.constexpr = k_ring.shape[3]
    D: gl.constexpr = k_ring.shape[4]
    WARPS: gl.constexpr = gl.num_warps()
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, D, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    OUTPUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    TAKE_TURNS: gl.constexpr = D > 32
    dtype: gl.constexpr = v_ring.dtype

    mbarrier.wait(q_filled, 0)
    q_tile = q_buffer.reshape([CONSUMER_ROWS, D])
    # the lowest finite number, so that a row that has seen no key yet makes no NaN of -inf - -inf
    m = gl.full([CONSUMER_ROWS], -3.4028234663852886e38, gl.float32, ROWS)
    l = _sum_in_thread(gl.zeros([CONSUMER_ROWS, BLOCK_N], gl.float32, SCORES))  # noqa: E741
    acc = gl.zeros([CONSUMER_ROWS, D], gl.float32, OUTPUT)
    if total > 0:
        mbarrier.wait(filled.index(0), 0)
        _wait_for_turn(turns, which, 0, TAKE_TURNS)
        s = _scores(q_tile, k_ring, 0, SCORES)
        _pass_turn(turns, which, TAKE_TURNS)
        s = warpgroup_mma_wait(0, [s])
        if whole == 0:
            s = _hide(s, limits.index(0), first_row, M, causal_block, CAUSAL)
        m, l, weights, shrink = _softmax(s, m, l, scale_log2)  # noqa: E741
        p = _operand(weights, dtype, OUTPUT)
        mbarrier.wait(filled.index(1 % STAGES), 0, pred=total > 1)
        for i in range(1, total):
            _wait_for_turn(turns, which, i, TAKE_TURNS)
            s = _scores(q_tile, k_ring, i, SCORES)
            acc = warpgroup_mma(p, _tile(v_ring, i - 1), acc, is_async=True)
            _pass_turn(turns, which, TAKE_TURNS)
            s = warpgroup_mma_wait(1, [s])
            if i >= whole:
                s = _hide(s, limits.index(i % STAGES), first_row, M, causal_block, CAUSAL)
            m, l, weights, shrink = _softmax(s, m, l, scale_log2)  # noqa: E741
            l = _pin(l)  # noqa: E741
            # waited for here, since the assembler moves no wait for a product across this one, up to where the scores
            # are read; and the weights are among what is waited for lest the compiler move the exponentials down
            mbarrier.wait(filled.index((i + 1) % STAGES), (i + 1) // STAGES & 1, pred=i + 1 < total)
            acc, weights, shrink = warpgroup_mma_wait(0, [acc, weights, shrink])
            mbarrier.arrive(emptied.index((i - 1) % STAGES), count=1)
            acc *= gl.convert_layout(shrink, OUTPUT_ROWS, assert_trivial=True)[:, None]
            p = _operand(weights, dtype, OUTPUT)
        acc = warpgroup_mma(p, _tile(v_ring, total - 1), acc)

    rows = first_row + gl.arange(0, CONSUMER_ROWS, layout=ROWS)
    l = gl.convert_layout(gl.sum(l, 1), ROWS)  # noqa: E741
    sees_none = l == 0
    acc *= gl.convert_layout(1.0 / gl.where(sees_none, 1.0, l), OUTPUT_ROWS, assert_trivial=True)[:, None]
    head = b.to(gl.int64) * Hq + h
    gl.store(lse + head * N + rows, gl.where(sees_none, float("inf"), m + gl.log2(l)), mask=rows < N)
    STORED: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    in_tile = gl.arange(0, CONSUMER_ROWS, layout=gl.SliceLayout(1, STORED))
    columns = gl.arange(0, D, layout=gl.SliceLayout(0, STORED))
    start = out + ((b.to(gl.int64) * N + first_row) * Hq + h) * D
    result = gl.convert_layout(acc.to(dtype), STORED)
    gl.store(start + (in_tile[:, None] * (Hq * D) + columns[None, :]), result, mask=(first_row + in_tile < N)[:, None])


@gluon.jit
def _wait_for_turn(turns, which: gl.constexpr, i, TAKE_TURNS: gl.constexpr):
    if TAKE_TURNS:
        if which == 0:  # which begins
            mbarrier.wait(turns.index(which), (i + 1) & 1)
        else:
            mbarrier.wait(turns.index(which), i & 1)


@gluon.jit
def _pass_turn(turns, which: gl.constexpr, TAKE_TURNS: gl.constexpr):
    if TAKE_TURNS:
        mbarrier.arrive(turns.index((which + 1) % turns.shape[0]), count=1)


@gluon.jit
def _tile(ring, i):
    return ring.index(i % ring.shape[0]).reshape([ring.shape[3], ring.shape[4]])


@gluon.jit
def _scores(q_tile, k_ring, i, SCORES: gl.constexpr):
    s = gl.full([q_tile.shape[0], k_ring.shape[3]], 0.0, gl.float32, SCORES)
    return warpgroup_mma(q_tile, _tile(k_ring, i).permute([1, 0]), s, use_acc=False, is_async=True)


@gluon.jit
def _hide(s, limits, first_row, M, causal_block, CAUSAL: gl.constexpr):
    """The scores of a key tile, -inf where a query does not see a key."""
    rows = first_row + gl.arange(0, s.shape[0], layout=gl.SliceLayout(1, s.type.layout))
    row_end = gl.minimum(rows + M, M)
    if CAUSAL:
        row_end = gl.minimum((rows // causal_block + 1) * causal_block, M)
    keys = limits.load(gl.SliceLayout(0, s.type.layout))
    return gl.where(keys[None, :] < row_end[:, None], s, float("-inf"))


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


def launch_forward_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    causal_block: int | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of checked arguments with at least one query and one key, 16-bit, D of HOPPER_FORWARD."""
    B, N, Hq, D = q.shape
    M, Hkv = k.shape[1:3]
    tile = HOPPER_FORWARD[D]
    q, k, v = (describable(x) for x in (q, k, v))
    out = q.new_empty(q.shape)
    lse = torch.empty(B, Hq, N, dtype=torch.float32, device=q.device)
    mask, key_tiles = mask_and_tiles(key_mask, tile.block_n, q)
    causal_block = binding_causal_block(causal_block, N, M)
    group = Hq // Hkv
    blocks = ((q, CONSUMER_ROWS.value), (k, tile.block_n), (v, tile.block_n))
    with torch.cuda.device_of(q):  # Triton launches on the current one
        _flash_fwd_hopper_kernel[(triton.cdiv(N, tile.block_m) * B * Hq,)](
            *(descriptor(x.transpose(1, 2), [1, 1, rows, D]) for x, rows in blocks),
            out, lse, mask, key_tiles,
            B, N, M, Hq, group, causal_block or 0, softmax_scale * math.log2(math.e),
            group * heads_in_l2(2 * M * D * k.element_size(), B * Hkv),
            STAGES=tile.num_stages, CAUSAL=causal_block is not None, HAS_MASK=key_mask is not None,
            num_warps=LOADING_WARPS, maxnreg=tile.max_registers,
        )  # fmt: skip
    return out, lse
