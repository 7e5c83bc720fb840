# mypy: allow-untyped-defs, allow-incomplete-defs
# (the arguments of Triton's functions are pointers, tiles and integers, which have no Python types)
"""Which key tiles a tile of queries visits, and in which order.

    sort_key_tiles(mask, block_n)    once a call: the tiles without padding first, then the partly padded ones
    tiles_to_visit, nth_tile         in a kernel: those that the queries see; without a mask, all up to a last one

Tiles without padding that every query sees need no mask arithmetic; tiles of nothing but padding are not visited.
Bytes: the mask is read twice, by one program a sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trunkline.kernels.triton_path import jit, tl, triton

TILES_AT_ONCE = 128


@jit
def _sort_key_tiles_kernel(mask, out, M, num_tiles, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    mask += b * M
    order = out + b * 3 * (num_tiles + 1)
    whole_before = order + num_tiles + 1
    partial_before = whole_before + num_tiles + 1
    num_whole = 0
    for start in range(0, num_tiles, BLOCK_T):
        whole, _ = _kinds(mask, start + tl.arange(0, BLOCK_T), M, BLOCK_N)
        num_whole += tl.sum(whole)
    wholes, partials = 0, 0
    for start in range(0, num_tiles + 1, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        whole, partial = _kinds(mask, tile, M, BLOCK_N)
        before, partly_before = wholes + tl.cumsum(whole) - whole, partials + tl.cumsum(partial) - partial
        tl.store(whole_before + tile, before, mask=tile <= num_tiles)
        tl.store(partial_before + tile, partly_before, mask=tile <= num_tiles)
        tl.store(order + tl.where(whole != 0, before, num_whole + partly_before), tile, mask=whole + partial != 0)
        wholes += tl.sum(whole)
        partials += tl.sum(partial)


@jit
def _kinds(mask, tile, M, BLOCK_N: tl.constexpr):
    """Of each tile, as 0 or 1: whether it holds real keys only, and whether some."""
    key = tile[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    real = tl.sum((tl.load(mask + key, mask=key < M, other=0) != 0).to(tl.int32), 1)
    return (real == BLOCK_N).to(tl.int32), ((real > 0) & (real < BLOCK_N)).to(tl.int32)


def sort_key_tiles(mask: Tensor, block_n: int) -> Tensor:
    """int32 [B, 3, tiles + 1] of a mask [B, M] of bytes, contiguous.

    Row 0 names the tiles without padding in rising order, then the partly padded ones, then nothing of meaning; row 1
    says how many tiles without padding stand before each tile of the sequence, row 2 the same for the partly padded.
    """
    B, M = mask.shape
    num_tiles = triton.cdiv(M, block_n)
    out = torch.empty(B, 3, num_tiles + 1, dtype=torch.int32, device=mask.device)
    with torch.cuda.device_of(mask):
        _sort_key_tiles_kernel[(B,)](mask, out, M, num_tiles, BLOCK_N=block_n, BLOCK_T=TILES_AT_ONCE, num_warps=8)
    return out


@jit
def tiles_to_visit(key_tiles, seen_by_all, seen_by_any, M, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr):
    """(whole, total, gap_at, gap): `whole` tiles need no mask, those from there to `total` do; for nth_tile the rest.

    Every query sees the first `seen_by_all` keys, none a key from `seen_by_any` on. key_tiles is what `sort_key_tiles`
    made of the mask. The places of the partly padded tiles follow those of all tiles without padding, also of the ones
    that are out of sight: that is the gap.
    """
    unmasked = seen_by_all // BLOCK_N
    end = tl.cdiv(seen_by_any, BLOCK_N)
    if HAS_MASK:
        num_tiles = tl.cdiv(M, BLOCK_N)
        without_padding = key_tiles + num_tiles + 1
        partly_padded = without_padding + num_tiles + 1
        gap_at = tl.load(without_padding + end)
        gap = tl.load(without_padding + num_tiles) - gap_at
        return tl.load(without_padding + unmasked), gap_at + tl.load(partly_padded + end), gap_at, gap
    else:
        return unmasked, end, 0, 0


@jit
def nth_tile(key_tiles, i, gap_at, gap, HAS_MASK: tl.constexpr):
    """The i-th key tile to visit, with what tiles_to_visit said; past the last one, a number of no meaning."""
    return tl.load(key_tiles + tl.where(i < gap_at, i, i + gap)) if HAS_MASK else i
