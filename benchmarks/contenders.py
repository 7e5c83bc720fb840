"""What `bench.py attention` compares: attention problems over fluid sequences, and the calls that solve them.

    make_problem(...)        q, k, v and the pattern of a sequence of T blocks of V variables, some of them padding
    PATTERNS, CONTENDERS     what is measured on which pattern, what matters most first
    references(problem)      what a result is checked against

cuDNN's kernel has no block-causal pattern: it runs as T unmasked slices, q of block t against the keys up to block t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trunkline.kernels.attention import flash_attention
from trunkline.kernels.reference import visible_pairs

V = 6712
PADDING = 0.05  # of a block's variables, its last ones
MOST_DENSE_BYTES = 2**32  # of a mask tensor for plain SDPA
MASKED, FULL, BLOCKED = "block-causal + key mask", "full", "block-causal"
PATTERNS = {
    MASKED: ["ours", "ours, deterministic", "FlexAttention, compiled", "plain SDPA with a mask"],
    FULL: ["ours", "cuDNN"],
    BLOCKED: ["ours", "cuDNN, slices"],
}
"""Pattern -> what runs on it."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Problem(NamedTuple):
    """What a call takes. All of q, k and v need gradients."""

    leaves: list[Tensor]  # q, k, v [1, N, H, D]
    block: int | None  # None for full attention
    key_mask: Tensor | None  # [1, N]

    @property
    def q(self) -> Tensor:
        return self.leaves[0]

    @property
    def wide(self) -> Problem:
        """The same in fp32."""
        return self._replace(leaves=[x.detach().float().requires_grad_() for x in self.leaves])

    @property
    def visible(self) -> int:
        """Pairs of a query and a key that it sees, over all heads."""
        _, N, H, _ = self.q.shape
        block = self.block or N
        real = torch.ones(1, N) if self.key_mask is None else self.key_mask
        seen = real.sum(0).cumsum(0)[[min(stop, N) - 1 for stop in range(block, N + block, block)]]
        rows = [min(block, N - start) for start in range(0, N, block)]
        return H * sum(int(count) * size for count, size in zip(seen, rows, strict=True))


def make_problem(
    tokens: int, head_dim: int, heads: int, block: int, masked: bool, blocked: bool, device: torch.device
) -> Problem:
    """Random values, in bf16 on a GPU and fp32 on a CPU; the same in every call."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    leaves = [torch.randn(1, tokens, heads, head_dim, device=device, generator=generator) for _ in range(3)]
    leaves = [x.to(dtype).requires_grad_() for x in leaves]
    key_mask = (torch.arange(tokens, device=device) % block < round((1 - PADDING) * block))[None] if masked else None
    return Problem(leaves, block if blocked else None, key_mask)


def upstream_of(problem: Problem) -> Tensor:
    """The gradient of the output, the same in every call."""
    generator = torch.Generator(problem.q.device).manual_seed(1)
    shape, dtype, device = problem.q.shape, problem.q.dtype, problem.q.device
    return torch.randn(shape, dtype=dtype, device=device, generator=generator)


def results(attend: Attention, problem: Problem, upstream: Tensor) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    out = attend(*problem.leaves)
    return [out.detach(), *torch.autograd.grad(out, problem.leaves, upstream)]


def references(problem: Problem, upstream: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """(plain, truth): the results of torch's own attention in the problem's dtype, and in fp32."""
    wide = problem.wide
    attend = slices(problem.block, problem.key_mask)
    return results(attend, problem, upstream), results(attend, wide, upstream.float())


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """torch's deterministic mode, which flash_attention obeys; nothing fills new memory, which would be timed."""
    before, memory = torch.are_deterministic_algorithms_enabled(), cast(Any, torch.utils.deterministic)
    fill = memory.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(on)
        memory.fill_uninitialized_memory = False
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = fill


def ours(problem: Problem) -> Attention:
    return partial(flash_attention, causal_block=problem.block, key_mask=problem.key_mask)


def slices(causal_block: int | None, key_mask: Tensor | None) -> Attention:
    """Torch's own fused attention, the queries of block t on the real keys up to block t."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        N = q.shape[1]
        block = causal_block or N
        parts = []
        for start in range(0, N, block):
            k_seen, v_seen = k[:, : start + block], v[:, : start + block]
            if key_mask is not None:
                real = key_mask[0, : start + block].nonzero()[:, 0]
                k_seen, v_seen = k_seen[:, real], v_seen[:, real]
            parts.append(_sdpa(q[:, start : start + block], k_seen, v_seen))
        return torch.cat(parts, dim=1)

    return attend


def under(backend: SDPBackend, attend: Attention) -> Attention:
    """The same by one of torch's fused kernels."""

    def attend_so(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return attend(q, k, v)

    return attend_so


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _cudnn(problem: Problem) -> Attention:
    if not problem.q.is_cuda:
        raise RuntimeError("needs a CUDA device")
    return under(SDPBackend.CUDNN_ATTENTION, slices(problem.block, problem.key_mask))


def _flex(problem: Problem) -> Attention:
    block, key_mask = problem.block or problem.q.shape[1], problem.key_mask
    real = None if key_mask is None else int(key_mask[0, :block].sum())
    return flex(problem.q.shape[1], problem.block, real, problem.q.device)


def flex(N: int, causal_block: int | None, real: int | None, device: torch.device) -> Attention:
    """FlexAttention over N rows, compiled at its first call; of each block the first `real` keys count, or all.

    It is given what it is fast with: rows filled up to a multiple of 128, and a mask that is computed, not read. Raises
    RuntimeError without a GPU.
    """
    if device.type != "cuda":
        raise RuntimeError("its backward pass needs a CUDA device")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block, rows = causal_block or N, -(-N // 128) * 128

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (j // block <= i // block) & (j < N)
        return seen if real is None else seen & (j % block < real)

    block_mask = create_block_mask(sees, None, None, rows, rows, device=device, _compile=True)
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (F.pad(x.transpose(1, 2), (0, 0, 0, rows - N)) for x in (q, k, v))
        return compiled(q, k, v, block_mask=block_mask)[:, :, :N].transpose(1, 2)

    return attend


def _dense(problem: Problem) -> Attention:
    N = problem.q.shape[1]
    if N * N * problem.q.element_size() > MOST_DENSE_BYTES:
        raise RuntimeError(f"a mask of {N:,} x {N:,} is more than {MOST_DENSE_BYTES / 2**30:.0f} GiB")
    mask = visible_pairs(N, N, problem.block, problem.key_mask, problem.q.device)
    return partial(_sdpa, mask=mask)


CONTENDERS: dict[str, Callable[[Problem], Attention]] = {
    "ours": ours,
    "ours, deterministic": ours,
    "cuDNN, slices": _cudnn,
    "cuDNN": _cudnn,
    "FlexAttention, compiled": _flex,
    "plain SDPA with a mask": _dense,
}
"""Name -> what makes the call, or raises saying why it cannot be had."""
