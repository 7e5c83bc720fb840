"""masked_mse: a squared error summed over the values that count, with the number of them.

    sum = sum_i m_i (y'_i - y_i)^2      count = sum_i m_i      d sum / d y'_i = 2 m_i (y'_i - y_i)

Two scalars, not their ratio: the mean over any number of batches and ranks is (sum of sums) / (sum of counts), exactly.
Where m is 0, neither the prediction nor the target matters, so a missing target may be NaN.

Bytes: forward one read of prediction, target and mask; backward the same and one write of each gradient. Some 4 FLOPs a
value: memory is the limit. A mask that broadcasts is read through its strides. Programs stride over the values, keep
their sums in registers and write each a row of its own, which a second, tiny kernel adds up: no atomics, so the same
bits in every run. Dtype: differences and sums in fp32 whatever the inputs are, also under autocast; gradients have the
dtypes of the inputs. On CPUs, and for fp64, torch's operators do it, in fp64 for fp64 predictions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trunkline.kernels.arguments import check_tensors
from trunkline.kernels.column_sums import column_sums
from trunkline.kernels.first_order import no_forward_mode, no_second_order
from trunkline.kernels.operators import Operator
from trunkline.kernels.triton_path import available, jit, num_multiprocessors, tl, triton

# 8 values a thread: with more, Triton passes the gradient through shared memory to change its layout before the store
TILE, NUM_WARPS, PROGRAMS_PER_SM = 2048, 8, 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@jit
def _locate(tile, R, C, tiles_a_row, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, FLAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """row [BLOCK_R, 1] int32 and column [1, BLOCK_C] int64 of a tile's values, and which of them exist."""
    if FLAT:  # one row: divisions would take longer than the memory does
        row = tl.zeros([BLOCK_R, 1], tl.int32)
        column = tl.cast(tile, tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    else:
        row = (tile // tiles_a_row) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
        column = tl.cast(tile % tiles_a_row, tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return row, column, (row < R) & (column < C)


@jit
def _weights(mask, row, column, inside, inner, stride0, stride1, STRIDE2: tl.constexpr, HAS_MASK: tl.constexpr):  # type: ignore[no-untyped-def]
    """m of a tile's values, fp32; 0 outside."""
    if HAS_MASK:
        start = (row // inner).to(tl.int64) * stride0 + (row % inner).to(tl.int64) * stride1
        return tl.load(mask + (start + column * STRIDE2), mask=inside, other=0).to(tl.float32)
    else:
        return inside.to(tl.float32)


@jit
def _masked_mse_fwd_kernel(  # type: ignore[no-untyped-def]
    pred,
    target,
    mask,
    partials,
    R,
    C_over_align,
    tiles,
    tiles_a_row,
    inner,
    stride0,
    stride1,
    STRIDE2: tl.constexpr,
    HAS_MASK: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = tl.cast(C_over_align, tl.int64) * ALIGN
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    count = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, column, inside = _locate(tile, R, C, tiles_a_row, BLOCK_R, BLOCK_C, FLAT)
        weight = _weights(mask, row, column, inside, inner, stride0, stride1, STRIDE2, HAS_MASK)
        value = row.to(tl.int64) * C + column
        p = tl.load(pred + value, mask=inside, other=0).to(tl.float32)
        t = tl.load(target + value, mask=inside, other=0).to(tl.float32)
        difference = tl.where(weight != 0, p - t, 0.0)
        total += weight * difference * difference
        count += weight
    tl.store(partials + tl.program_id(0) * 2, tl.sum(total))
    tl.store(partials + tl.program_id(0) * 2 + 1, tl.sum(count))


@jit
def _masked_mse_bwd_kernel(  # type: ignore[no-untyped-def]
    pred,
    target,
    mask,
    grad_sum,
    grad_pred,
    grad_target,
    R,
    C_over_align,
    tiles,
    tiles_a_row,
    inner,
    stride0,
    stride1,
    STRIDE2: tl.constexpr,
    HAS_MASK: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NEED_PRED: tl.constexpr,
    NEED_TARGET: tl.constexpr,
):
    C = tl.cast(C_over_align, tl.int64) * ALIGN
    scale = 2.0 * tl.load(grad_sum)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row, column, inside = _locate(tile, R, C, tiles_a_row, BLOCK_R, BLOCK_C, FLAT)
        weight = _weights(mask, row, column, inside, inner, stride0, stride1, STRIDE2, HAS_MASK)
        value = row.to(tl.int64) * C + column
        p = tl.load(pred + value, mask=inside, other=0).to(tl.float32)
        t = tl.load(target + value, mask=inside, other=0).to(tl.float32)
        gradient = tl.where(weight != 0, scale * weight * (p - t), 0.0)
        if NEED_PRED:
            tl.store(grad_pred + value, gradient.to(grad_pred.dtype.element_ty), mask=inside)
        if NEED_TARGET:
            tl.store(grad_target + value, (-gradient).to(grad_target.dtype.element_ty), mask=inside)


def _tiling(pred: Tensor, mask: Tensor | None) -> tuple[int, dict[str, Any]]:
    """The number of programs, and the kernels' arguments that say how they share the values, seen as [R, C]."""
    mask, outer, inner, C, strides = _mask_layout(mask, pred.shape)
    R = outer * inner
    block_c = min(TILE, triton.next_power_of_2(max(C, 1)))
    block_r = 1 if R == 1 else TILE // block_c
    tiles_a_row = triton.cdiv(C, block_c)
    tiles = triton.cdiv(R, block_r) * tiles_a_row
    # the power of 2 in C: it shows the compiler which loads are aligned to 16 bytes, also where 16 does not divide C
    align = min(16, C & -C) or 1
    return max(1, min(tiles, PROGRAMS_PER_SM * num_multiprocessors(pred.device))), {
        "mask": pred if mask is None else mask,
        "R": R,
        "C_over_align": C // align,
        "tiles": tiles,
        "tiles_a_row": tiles_a_row,
        "inner": inner,
        "stride0": strides[0],
        "stride1": strides[1],
        "STRIDE2": strides[2],
        "HAS_MASK": mask is not None,
        "FLAT": R == 1,
        "ALIGN": align,
        "BLOCK_R": block_r,
        "BLOCK_C": block_c,
        "num_warps": NUM_WARPS,
    }


def _mask_layout(mask: Tensor | None, shape: torch.Size) -> tuple[Tensor | None, int, int, int, tuple[int, int, int]]:
    """(mask, outer, inner, C, strides): the values as [outer, inner, C], and what the mask steps by in each of them.

    Dimensions over which the mask runs on, or stands still, become one. A mask that needs more than three, or steps by
    more than 1 in the innermost, is copied to full size.
    """
    if mask is None:
        return None, 1, 1, shape.numel(), (0, 0, 0)
    mask = mask.expand(shape)
    runs: list[tuple[int, int]] = []
    for size, stride in zip(mask.shape, mask.stride(), strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == stride * size:
            size *= runs.pop()[0]
        runs.append((size, stride))
    runs = [(1, 0)] * (3 - len(runs)) + runs
    (outer, stride0), (inner, stride1), (C, stride2) = runs[-3:]
    if len(runs) > 3 or stride2 not in (0, 1) or outer * inner >= 2**31:
        return mask.contiguous(), 1, 1, shape.numel(), (0, 0, 1)
    return mask, outer, inner, C, (stride0, stride1, stride2)


def _forward(pred: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    programs, arguments = _tiling(pred, mask)
    partials = torch.empty(programs, 2, dtype=torch.float32, device=pred.device)
    with torch.cuda.device_of(pred):
        _masked_mse_fwd_kernel[(programs,)](
            pred=pred.contiguous(), target=target.contiguous(), partials=partials, **arguments
        )
        return column_sums(partials)


def _backward(
    grad: Tensor, pred: Tensor, target: Tensor, mask: Tensor | None, need_pred: bool, need_target: bool
) -> tuple[Tensor, Tensor]:
    programs, arguments = _tiling(pred, mask)
    grad_pred, grad_target = _gradients(grad, pred, target, mask, need_pred, need_target)
    with torch.cuda.device_of(pred):
        _masked_mse_bwd_kernel[(programs,)](
            pred=pred.contiguous(),
            target=target.contiguous(),
            grad_sum=grad.contiguous(),
            grad_pred=grad_pred,
            grad_target=grad_target,
            NEED_PRED=need_pred,
            NEED_TARGET=need_target,
            **arguments,
        )
    return grad_pred, grad_target


def _gradients(
    grad: Tensor, pred: Tensor, target: Tensor, mask: Tensor | None, need_pred: bool, need_target: bool
) -> tuple[Tensor, Tensor]:
    return pred.new_empty(pred.shape if need_pred else 0), target.new_empty(target.shape if need_target else 0)


forward = Operator("masked_mse", _forward, lambda pred, *_: pred.new_empty(2, dtype=torch.float32))
"""[2] fp32: sum, count."""
backward = Operator("masked_mse_backward", _backward, _gradients)
"""The gradients of pred and target, empty where not needed; grad [2], of which the count's part is unused."""


class _MaskedMse(torch.autograd.Function):
    """apply(pred, target, mask)[0] is [2] fp32: sum, count."""

    generate_vmap_rule = True

    @staticmethod
    def forward(pred: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        sums = forward(pred, target, mask)
        return sums, sums.new_empty(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[1], *inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        link, *saved = ctx.saved_tensors
        need_pred, need_target, _ = ctx.needs_input_grad
        grad_pred, grad_target = backward(grad, *saved, need_pred, need_target)
        needed = grad_pred if need_pred else None, grad_target if need_target else None
        return *no_second_order("masked_mse", link, grad, *needed), None


def masked_mse(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sum, count) of the squared error of `pred` against `target`, two fp32 scalars.

    pred and target have one shape, any floating dtype. `mask` is bool, or floating for weights, broadcastable to pred;
    None counts every value. Differentiable in pred and target; the mask is a constant.

    Raises ValueError for arguments that do not fit together.
    """
    check(pred, target, mask)
    if runs_on_triton(pred, target, mask):
        no_forward_mode("masked_mse", pred, target)
        total, count = _MaskedMse.apply(pred, target, mask)[0].unbind()
        return total, count.detach()
    accumulator = torch.float64 if pred.dtype == torch.float64 else torch.float32
    if mask is None:
        difference = pred.to(accumulator) - target.to(accumulator)
        return difference.square().sum(), torch.full((), pred.numel(), dtype=accumulator, device=pred.device)
    mask = mask.detach().expand(pred.shape)
    difference = (pred.to(accumulator) - target.to(accumulator)).masked_fill(mask == 0, 0)
    if mask.dtype == torch.bool:
        return difference.square().sum(), mask.sum().to(accumulator)
    weights = mask.to(accumulator)
    return (weights * difference.square()).sum(), weights.sum()


def runs_on_triton(*tensors: Tensor | None) -> bool:
    """Whether the kernels of squared errors take these: all on a device that they run on, in dtypes that they know."""
    return all(x is None or (available(x) and x.dtype in (*DTYPES, torch.bool)) for x in tensors)


def check(pred: Tensor, target: Tensor, mask: Tensor | None, name: str = "pred") -> None:
    """ValueError where a prediction, a target and a mask do not go together; `name` is what the first one is called."""
    check_tensors(**{name: pred, "target": target})
    for what, x in ((name, pred), ("target", target)):
        if not x.is_floating_point():
            raise ValueError(f"{what} must be floating; got {x.dtype}")
    if pred.shape != target.shape:
        raise ValueError(f"target must be {list(pred.shape)} to go with {name}; got {list(target.shape)}")
    if target.device != pred.device:
        raise ValueError(f"target is on {target.device}, {name} on {pred.device}; they must be on one device")
    if mask is None:
        return
    check_tensors(mask=mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"mask must be bool or floating; got {mask.dtype}")
    if mask.device != pred.device:
        raise ValueError(f"mask is on {mask.device}, {name} on {pred.device}; they must be on one device")
    fits = mask.dim() <= pred.dim() and all(
        m in (1, p) for m, p in zip(reversed(mask.shape), reversed(pred.shape), strict=False)
    )
    if not fits:
        raise ValueError(f"mask must broadcast to {list(pred.shape)}; got {list(mask.shape)}")
