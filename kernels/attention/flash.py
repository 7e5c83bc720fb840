"""flash_attention: exact attention over long sequences, without any N x M tensor.

    out_i = sum_j p_ij v_j,   p_ij = exp(s q_i.k_j) / sum_j' exp(s q_i.k_j'),   over the keys j that query i sees

With causal_block c, query i sees key j if and only if j // c <= i // c: whole blocks of the sequence follow one
another, and within its own block a query sees everything. A key that `key_mask` calls padding is seen by nobody.

On GPUs the Triton kernels of forward.py and backward.py do it, and on Hopper, where hopper.py says so, those of
forward_hopper.py and backward_hopper.py. The path below is composed of torch's own fused attention and runs on any
device, and in fp64. Block-causal attention needs no mask there: the queries of block t attend, unmasked, to the first
(t+1)c keys. On a GPU it serves short sequences, little work and wide heads in 16 bits, where it is one call: every key
is seen, or causal_block is 1, without a key mask, outside of torch's deterministic mode.

FLOPs: 4D useful ones a visible pair and query head forward, 10D backward. Bytes: with R = B N Hq D, S = B M Hkv D and e
bytes a value the forward pass moves e (2R + 2S) bytes from and to memory, as long as the keys of the heads at work fit
in the L2 cache. Both passes of the Triton kernels together hold
    e (4R + 4S)     q, k, v, out and their gradients
    12 B N Hq       the log-sum-exp of each row, and backward again beside rowsum(dO * O), fp32; 36 B N Hq where
                    backward_hopper.py runs
    4 R             dQ while it is summed, fp32 (not in deterministic mode)
and nothing of size N x M: 67,120 tokens with 8 heads of 64 in bf16 take 524.4 + 6.1 + 131.1 = 661.6 MiB, 673.9 MiB
where backward_hopper.py runs, and twice the length takes twice that. The path below also holds copies: of all that a
key mask changes, of slices, and, where _takes_groups says no, of k and v for each query head. Dtype: inputs and outputs
in one dtype, softmax and sums in fp32; under autocast q, k and v are cast to its dtype first, as torch's own attention
does.
Dao et al., "FlashAttention" (2022); Dao, "FlashAttention-2" (2023).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.kernels.arguments import autocast_dtype, check_integer, check_positive, check_tensors
from trunkline.kernels.attention.op import FlashAttention
from trunkline.kernels.first_order import first_order, no_forward_mode
from trunkline.kernels.triton_path import available

ROWS_PER_CHANNEL = 32
"""Up to this many rows for each channel of a head torch's own kernel serves. It was as fast or faster on an H200."""
PRODUCTS = 2**34
"""So it does up to this many products of channels, B H N M D: a call of the Triton kernels takes the host longer there
than the GPU. On an H200 torch's kernel was 1.6 times as fast at half of it."""
WIDEST = 64
"""So it does with wider heads: the Triton kernels are not tuned for them. On an H200 torch's kernel was 2.5 times as
fast at 8,192 rows of 128. Other widths were not timed."""
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal_block: int | None = None,
    key_mask: Tensor | None = None,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attention of q [B, N, Hq, D] over k, v [B, M, Hkv, D]; the result has the shape and the dtype of q.

    Hq is a multiple of Hkv: each key head serves Hq / Hkv query heads in a row. bf16, fp16 or fp32 (fp64 too, to check
    gradients); D from 16 to 256; N and M are free and need not be equal.
    `causal_block` = c lets query i see key j iff j // c <= i // c (1: causal; None: every key).
    `key_mask` [B, M] bool is True at real keys. A query that sees no key returns 0 and passes no gradient.
    `softmax_scale` multiplies q.k before the softmax; D ** -0.5 unless given. It is a number; one that is learned, a
    tensor, belongs to q.

    Raises ValueError for arguments that do not fit together, RuntimeError where it is differentiated twice, or in
    forward mode.
    """
    dtype = _check(q, k, v, causal_block, key_mask, softmax_scale)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    N, M, D = q.shape[1], k.shape[1], q.shape[-1]
    on_triton = available(q) and dtype != torch.float64 and not _torch_serves(q, k, dtype, causal_block, key_mask)
    if q.numel() and M and on_triton:
        no_forward_mode("flash_attention", q, k, v)
        q, k, v = (x.to(dtype) for x in (q, k, v))
        if D % 8:  # rows of whole 16 bytes; the zeros change no score
            q, k, v = (F.pad(x, (0, -D % 8)) for x in (q, k, v))
        out = FlashAttention.apply(q, k, v, key_mask, causal_block, scale)[0]
        return out[..., :D] if D % 8 else out
    q, k, v = (x.to(dtype) for x in first_order("flash_attention", q, k, v))
    if q.numel() == 0 or M == 0:
        # Nothing is visible. The empty slices tie k and v into the graph, so that their gradients are zeros.
        nothing = k[:, :0].sum() + v[:, :0].sum()
        return q.masked_fill(torch.ones((), dtype=torch.bool, device=q.device), 0) + nothing
    sees = None
    if key_mask is not None:
        sees, padding = _sees_any_key(key_mask, N, causal_block)[:, :, None, None], ~key_mask[:, :, None, None]
        # 0 x NaN would reach the result
        q, k, v = q.masked_fill(~sees, 0), k.masked_fill(padding, 0), v.masked_fill(padding, 0)
        if causal_block == 1:
            q, k, v = _fold_mask_into_scores(q, k, v, padding)
            key_mask = None
    groups = q.shape[2] // k.shape[2]
    if groups > 1 and not _takes_groups(q, key_mask):
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # or torch's kernel falls to a dense one
    out = _attend(q, k, v, causal_block, scale, key_mask)
    return out if sees is None else out[..., :D].masked_fill(~sees, 0).to(dtype)


def _torch_serves(q: Tensor, k: Tensor, dtype: torch.dtype, causal_block: int | None, key_mask: Tensor | None) -> bool:
    """Whether a GPU's torch solves it with a kernel of its own that is at least as fast, or launched sooner."""
    (B, N, H, D), M = q.shape, k.shape[1]
    longest = max(N, M)
    one_call = key_mask is None and (causal_block is None or causal_block == 1 or causal_block >= longest)
    faster = longest <= ROWS_PER_CHANNEL * D or B * H * N * M * D <= PRODUCTS or D > WIDEST
    in_grid = max(B, H) < 2**16  # the second and the third dimension of its grid of programs
    serves = one_call and faster and in_grid and dtype.itemsize == 2
    return q.is_cuda and serves and not torch.are_deterministic_algorithms_enabled()


def _takes_groups(q: Tensor, key_mask: Tensor | None) -> bool:
    """Whether a fused kernel of torch takes fewer key heads than query heads, with gradients as exact.

    That for CPUs rounds dk and dv to the dtype of k at each head that it adds: in 16 bits that is too coarse. On GPUs
    those for 16 bits without a mask do, up to the head dimension that they train on every GPU; in place of the others
    torch would hold an N x M matrix.
    """
    narrow = q.dtype.itemsize == 2
    if q.is_cuda:
        return narrow and key_mask is None and q.shape[-1] <= 192
    return q.is_cpu and not narrow


def _attend(
    q: Tensor, k: Tensor, v: Tensor, causal_block: int | None, scale: float, key_mask: Tensor | None = None
) -> Tensor:
    """The attention itself, in as few fused calls as the pattern allows. q [B, N, H, D], k and v [B, M, H, D]."""
    N, M = q.shape[1], k.shape[1]
    if causal_block is None:
        return _fused(q, k, v, scale, key_mask)
    if causal_block == 1:
        square = min(N, M)  # later keys are seen by no query; later queries see every key
        out = _fused(q[:, :square], k[:, :square], v[:, :square], scale, is_causal=True)
        return out if square == N else torch.cat([out, _fused(q[:, square:], k, v, scale)], dim=1)
    parts, start = [], 0
    while start < N:
        seen = min(start + causal_block, M)
        stop = N if seen == M else min(start + causal_block, N)
        mask = None if key_mask is None else key_mask[:, :seen]
        parts.append(_fused(q[:, start:stop], k[:, :seen], v[:, :seen], scale, mask))
        start = stop
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, scale: float, key_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    q, k, v, mask = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None
    if key_mask is not None:  # with no key at all, each is seen: such rows would be NaN, and are not looked at
        mask = (key_mask | ~key_mask.any(dim=1, keepdim=True))[:, None, None]
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


_EXTRA = 8  # columns that carry the key mask: one would do, eight keep the head dimension a multiple of eight
_NEVER = -1e30  # a score whose exponential is 0, and finite, so that rows without a key make no NaN


def _fold_mask_into_scores(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Append columns to q, k and v so that q.k is as before at real keys and hugely negative at padding.

    So the causal pattern, which torch's kernels do not combine with masks, stays a call without a mask tensor.
    """
    if q.dtype == torch.float16:  # its range ends at 65504
        q, k, v = q.float(), k.float(), v.float()
    select = F.pad(q.new_ones(1), (0, _EXTRA - 1)).expand(*q.shape[:-1], _EXTRA)
    score = torch.zeros_like(padding, dtype=k.dtype).masked_fill(padding, _NEVER)
    score = F.pad(score, (0, _EXTRA - 1)).expand(*k.shape[:-1], _EXTRA)
    return (
        torch.cat([q, select], dim=-1),
        torch.cat([k, score], dim=-1),
        F.pad(v, (0, _EXTRA)),
    )


def _sees_any_key(key_mask: Tensor, num_queries: int, causal_block: int | None) -> Tensor:
    """[B, N] bool: whether query i sees at least one real key."""
    if causal_block is None:
        return key_mask.any(dim=1, keepdim=True).expand(-1, num_queries)
    M = key_mask.shape[1]
    first = torch.arange(M, device=key_mask.device).masked_fill(~key_mask, torch.iinfo(torch.int64).max).amin(dim=1)
    rows = torch.arange(num_queries, device=key_mask.device)
    return first[:, None] // causal_block <= rows // causal_block


def _check(
    q: Tensor, k: Tensor, v: Tensor, causal_block: int | None, key_mask: Tensor | None, softmax_scale: float | None
) -> torch.dtype:
    """That of the computation."""
    check_tensors(q=q, k=k, v=v)
    dtype = autocast_dtype(q)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be a tensor [batch, sequence, heads, head_dim]; got shape {list(x.shape)}")
        if x.dtype not in _DTYPES or (x.dtype != q.dtype and autocast_dtype(x) != dtype):
            raise ValueError(f"{name} has dtype {x.dtype}; q, k and v must share one of bf16, fp16, fp32, fp64")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, q on {q.device}; they must be on one device")
    B, _, Hq, D = q.shape
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape; got {list(k.shape)} and {list(v.shape)}")
    if k.shape[0] != B or k.shape[3] != D:
        raise ValueError(f"k must be [{B}, M, Hkv, {D}] to go with q {list(q.shape)}; got {list(k.shape)}")
    if not 16 <= D <= 256:
        raise ValueError(f"head_dim must lie between 16 and 256; q has {D}")
    if k.shape[2] == 0 or Hq % k.shape[2]:
        raise ValueError(f"the {Hq} heads of q must be a multiple of the {k.shape[2]} heads of k")
    if causal_block is not None:
        check_integer("causal_block", causal_block, least=1)
    if softmax_scale is not None:
        check_positive("softmax_scale", softmax_scale)
    if key_mask is not None:
        expected = [B, k.shape[1]]
        check_tensors(key_mask=key_mask)
        if key_mask.dtype != torch.bool or list(key_mask.shape) != expected:
            raise ValueError(f"key_mask must be bool {expected}; got {key_mask.dtype} {list(key_mask.shape)}")
        if key_mask.device != q.device:
            raise ValueError(f"key_mask is on {key_mask.device}, q on {q.device}; they must be on one device")
    return dtype
