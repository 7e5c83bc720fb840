"""column_sums: what the programs of a kernel have summed, added up.

    out_j = sum_i partials_ij

A kernel whose programs each write one row of partial sums needs no atomics, and its result is the same bit for bit
in every run. Bytes: 4 P n for P programs, next to nothing. Dtype: fp32 in and out, added in fp64, so that a count stays
exact as long as fp32 can hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trunkline.kernels.triton_path import jit, tl, triton


@jit
def _column_sums_kernel(partials, out, P, n, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_P, BLOCK_N], tl.float64)
    for start in range(0, P, BLOCK_P):
        row = start + tl.arange(0, BLOCK_P)
        inside = (row < P)[:, None] & (column < n)[None, :]
        total += tl.load(partials + row[:, None].to(tl.int64) * n + column[None, :], mask=inside, other=0).to(
            tl.float64
        )
    tl.store(out + column, tl.sum(total, 0).to(tl.float32), mask=column < n)


def column_sums(partials: Tensor) -> Tensor:
    """[P, n] fp32, contiguous -> [n] fp32."""
    P, n = partials.shape
    out = torch.empty(n, dtype=torch.float32, device=partials.device)
    block = min(32, triton.next_power_of_2(n))
    _column_sums_kernel[(triton.cdiv(n, block),)](
        partials, out, P, n, BLOCK_P=2048 // block, BLOCK_N=block, num_warps=8
    )
    return out
