"""linear_cross_entropy: the loss of a language model's head, without all logits at once.

    z_i = W h_i + b      loss_i = log sum_v exp(z_iv) - z_i,t(i)      g_i = softmax(z_i) - onehot(t_i)
    d loss_i / d h_i = W^T g_i      d W = sum_i g_i h_i^T      d b = sum_i g_i

Rows go by in chunks: logits, softmax, and at once the gradients, while the logits are still there. The loss's own
gradient is one number, which comes later and is multiplied in then; so training takes the 3 products that cannot be
avoided, 6 N V d FLOPs, and none twice. Per-row losses need theirs before the sum over rows: they compute the logits
again, 8 N V d FLOPs. Rows whose target is `ignore_index` are left out before the first product on a CPU. A GPU computes
them with weight 0 instead, since how many are left would have to be known before anything is launched, a wait.

Bytes held: with C rows a chunk, 8 C V for logits and probabilities (another 2 C V where they are rounded for the
products), instead of 4 N V and more; between forward and backward the gradients, 4 V d of W and e N d of h.
Dtype: the products take hidden and weight in their dtype, autocast's where that is on, and sum in fp32; logits and
products are rounded to that dtype once more on a CPU, as those of torch's own linear are, and stay fp32 on a GPU. The
softmax, the losses, the sums over chunks and the bias are in fp32 (all of it in fp64 for fp64). Where hidden is fp16,
its gradient stays in fp32 until it meets the loss scale, and on a GPU the g_i, most of which are below fp16's least
number, are multiplied by 2^12 for the products. fp16 on a CPU is computed in fp32, 4 to 125 times as fast there.
Hsu et al., "Liger Kernel: Efficient Triton Kernels for LLM Training" (2024); Wijmans et al., "Cut Your Losses in
Large-Vocabulary Language Models" (2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from trunkline.kernels.arguments import autocast_dtype, check_integer, check_tensors
from trunkline.kernels.first_order import no_forward_mode, no_second_order

# A chunk's logits in fp32. On a CPU, 16 to 64 MiB took the same time, for weights of 10,000 x 128. A GPU needs longer
# products to be busy, and adds to the gradient of W once a chunk.
CHUNK_BYTES, GPU_CHUNK_BYTES = 2**25, 2**28
# A chunk reads W twice, and reads and writes its gradient: with fewer rows the products would wait for memory.
MIN_ROWS = 512
_FP16_SCALE = 2.0**12
_NAME = "linear_cross_entropy"
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of hidden, weight and bias; None for those that nobody asked for."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "sum",
) -> Tensor:
    """-log softmax(hidden @ weight.T + bias)[target]: the sum over rows, a scalar, or with "none" each, [N]; fp32.

    hidden [N, d], weight [V, d], bias [V], all bf16, fp16, fp32 or fp64 (which gives fp64); targets [N] int64. Rows
    whose target is `ignore_index` give 0 and no gradient, whatever they hold. Under autocast hidden, weight and bias
    may differ in dtype. Differentiable once in hidden, weight and bias.

    Raises ValueError for arguments that do not fit together, and on a CPU for targets outside of [0, V); RuntimeError
    where it is differentiated twice, or in forward mode.
    """
    dtype = _check(hidden, weight, targets, bias, ignore_index, reduction)
    no_forward_mode(_NAME, hidden, weight, bias)
    if reduction == "sum":
        return _Sum.apply(hidden, weight, bias, targets, ignore_index, dtype, torch.is_grad_enabled())[0]
    return _Rows.apply(hidden, weight, bias, targets, ignore_index, dtype)[0]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        dtype: torch.dtype,
        training: bool,
    ) -> tuple[Tensor, Tensor]:
        needs = tuple(training and need for need in ctx.needs_input_grad[:3])
        losses, gradients = _sweep(hidden, weight, bias, targets, ignore_index, dtype, needs)
        link = losses.new_zeros(())
        ctx.save_for_backward(link, *gradients)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return losses.sum(), link

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        link, *gradients = ctx.saved_tensors
        with torch.no_grad():
            scaled = _scaled(gradients, grad, ctx.dtypes)
        return *no_second_order(_NAME, link, grad, *scaled), None, None, None, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        ignore_index: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        losses, _ = _sweep(hidden, weight, bias, targets, ignore_index, dtype)
        link = losses.new_zeros(())
        ctx.save_for_backward(link, hidden, weight, bias, targets)
        ctx.ignore_index, ctx.dtype = ignore_index, dtype
        return losses, link

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        link, hidden, weight, bias, targets = ctx.saved_tensors
        needs, dtypes = ctx.needs_input_grad[:3], (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        with torch.no_grad():
            grad = upstream.where(targets != ctx.ignore_index, 0)
            # The largest is taken out, so that what is left, times hidden, fits fp16 whatever the loss scale is.
            largest = grad.abs().amax().clamp_min(torch.finfo(grad.dtype).tiny) if len(grad) else grad.new_ones(())
            _, gradients = _sweep(hidden, weight, bias, targets, ctx.ignore_index, ctx.dtype, needs, grad / largest)
            scaled = _scaled(gradients, largest, dtypes)
        return *no_second_order(_NAME, link, upstream, *scaled), None, None, None


def _scaled(gradients: Sequence[Tensor | None], factor: Tensor, dtypes: tuple[torch.dtype | None, ...]) -> Gradients:
    """The gradients times a scalar. It is not rounded to bf16 first, which it would be beside a tensor of bf16."""
    hidden, weight, bias = (
        None if gradient is None else (gradient.to(factor.dtype) * factor).to(dtype)
        for gradient, dtype in zip(gradients, dtypes, strict=True)
    )
    return hidden, weight, bias


def _sweep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    dtype: torch.dtype,
    needs: tuple[bool, ...] = (False, False, False),
    row_scale: Tensor | None = None,
    compact: bool | None = None,
) -> tuple[Tensor, Gradients]:
    """The losses [N], and the gradients of the sum over rows of row_scale [N] (or 1) times loss, in wide dtypes.

    `compact` leaves ignored rows out, rather than giving them weight 0; None does what suits the device.
    """
    (N, d), V = hidden.shape, weight.shape[0]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kept = targets != ignore_index
    rows = None
    if _is_read_at_once(targets) if compact is None else compact:
        rows = None if kept.all() else kept.nonzero().squeeze(1)
    else:
        row_scale = kept.to(wide) if row_scale is None else row_scale.where(kept, 0)
        targets = targets.where(kept, 0)
    masked = rows is None and row_scale is not None
    num_rows = N if rows is None else len(rows)
    C = _chunk_rows(num_rows, V, GPU_CHUNK_BYTES if hidden.is_cuda else CHUNK_BYTES)
    with torch.autocast(hidden.device.type, enabled=False):
        factors = torch.float32 if dtype == torch.float16 and not hidden.is_cuda else dtype
        w = weight.to(dtype).to(factors)
        g_scale = _FP16_SCALE if factors == torch.float16 else 1.0
        logits, probabilities = (torch.empty(C, V, dtype=wide, device=hidden.device) for _ in range(2))
        product = torch.empty(C, d, dtype=wide, device=hidden.device)
        losses = torch.zeros(N, dtype=wide, device=hidden.device)
        need_hidden, need_weight, need_bias = needs
        hidden_dtype = wide if hidden.dtype == torch.float16 else hidden.dtype
        grad_hidden = torch.zeros_like(hidden, dtype=hidden_dtype) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        grad_bias = losses.new_zeros(V) if need_bias else None
        for start in range(0, num_rows, C):
            stop = min(start + C, num_rows)
            at = slice(start, stop) if rows is None else rows[start:stop]
            h, t = hidden[at].to(dtype).to(factors), targets[at, None]
            scale = None if row_scale is None else row_scale[at, None]
            if masked:
                h = h.where(kept[at, None], 0)  # what is ignored may be anything
            z = _multiply(h, w.t(), logits[: stop - start])
            if bias is not None:
                z += bias.to(dtype)
            p = torch.log_softmax(z, dim=1, out=probabilities[: stop - start])
            loss = -p.gather(1, t).squeeze(1)
            losses[at] = loss.where(kept[at], 0) if masked else loss
            if not any(needs):
                continue
            g = p.exp_().scatter_add_(1, t, p.new_full((), -1).expand_as(t))
            if grad_bias is not None:
                grad_bias += g.sum(0) if scale is None else (scale.t() @ g).squeeze(0)
            if g_scale != 1:
                g *= g_scale
            g = g.to(factors)
            if grad_hidden is not None:
                grad_h = _multiply(g, w, product[: stop - start]).mul_(
                    1 / g_scale if scale is None else scale / g_scale
                )
                grad_hidden[at] = grad_h.to(hidden_dtype)
            if grad_weight is not None:
                _add_product(grad_weight, g.t(), h if scale is None else (h * scale).to(factors), 1 / g_scale)
    return losses, (grad_hidden, grad_weight, grad_bias)


def _is_read_at_once(x: Tensor) -> bool:
    """Whether a look at values of x costs nothing: no wait for a device, nor is it a fake tensor, which has none."""
    return x.device.type == "cpu" and not isinstance(x, FakeTensor)


def _chunk_rows(num_rows: int, V: int, most_bytes: int) -> int:
    """Rows a chunk, at least 1: of the fewest chunks that keep to the limit, of nearly equal sizes."""
    most = max(MIN_ROWS, most_bytes // (4 * V))
    chunks = max(1, -(-num_rows // most))
    return max(1, -(-num_rows // chunks))


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b, in out's dtype, which may be wider than that of a and b."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(a @ b)


def _add_product(out: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    """out += factor a @ b, in out's dtype, which may be wider than that of a and b."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, alpha=factor)
    elif a.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, alpha=factor, out=out)
    else:
        out.add_(a @ b, alpha=factor)


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> torch.dtype:
    """The dtype of the products."""
    check_tensors(hidden=hidden, weight=weight, targets=targets, **({} if bias is None else {"bias": bias}))
    check_integer("ignore_index", ignore_index, least=-(2**63))
    if not isinstance(reduction, str) or reduction not in ("sum", "none"):
        raise ValueError(f"reduction must be 'sum' or 'none'; got {reduction!r}")
    if hidden.dim() != 2 or hidden.shape[1] < 1:
        raise ValueError(f"hidden must be [N, d], d at least 1; got {list(hidden.shape)}")
    (N, d), V = hidden.shape, weight.shape[0] if weight.dim() else 0
    if weight.dim() != 2 or weight.shape[1] != d or V < 1:
        raise ValueError(f"weight must be [V, {d}] to go with hidden {list(hidden.shape)}; got {list(weight.shape)}")
    if bias is not None and list(bias.shape) != [V]:
        raise ValueError(f"bias must be [{V}] to go with weight {list(weight.shape)}; got {list(bias.shape)}")
    if targets.dtype != torch.int64 or list(targets.shape) != [N]:
        raise ValueError(f"targets must be int64 [{N}]; got {targets.dtype} {list(targets.shape)}")
    dtype = autocast_dtype(hidden)
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias), ("targets", targets)):
        if x is None:
            continue
        if x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device}, hidden on {hidden.device}; they must be on one device")
        if name != "targets" and (x.dtype not in _DTYPES or autocast_dtype(x) != dtype):
            raise ValueError(
                f"{name} has dtype {x.dtype}; hidden ({hidden.dtype}), weight and bias must share one of bf16, fp16, "
                "fp32, fp64, or be cast by autocast"
            )
    if _is_read_at_once(targets):
        wrong = (targets != ignore_index) & ((targets < 0) | (targets >= V))
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"targets must lie in [0, {V}), the rows of weight, or be ignore_index {ignore_index}; row {row} has "
                f"{int(targets[row])}"
            )
    return dtype
