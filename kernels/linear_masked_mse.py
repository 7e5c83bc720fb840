"""linear_masked_mse: masked_mse of a prediction that is one linear layer's output, which is never written.

    y'_i = h_i.w + b      sum = sum_i e_i (y'_i - y_i)      e_i = m_i (y'_i - y_i)      count = sum_i m_i
    d sum / d h_i = 2 e_i w      d w = sum_i 2 e_i h_i      d b = sum_i 2 e_i      d y_i = -2 e_i

Forward and backward each pass once over the hidden rows [N, d]; rows with m = 0 are not read. Between them stand the
e_i, 4 N bytes. Bytes in bf16: forward 2 N d, backward 4 N d, and some 4 N for each of target, e and gradient of target,
of which the backward pass reads e once for each 128 columns; 4 N d FLOPs each way: memory is the limit. Programs stride
over the rows and fetch the next ones while they work on some (in the forward pass up to d = 2048), and a step before
that what says which of them count. Each writes a row of partial sums, which a second, tiny kernel adds up: no atomics,
so the same bits in every run.
Dtype: products, differences and sums in fp32 whatever the inputs are, also under autocast; gradients have the dtypes of
the inputs. On CPUs, and for fp64, the prediction is torch's F.linear, in the dtype of hidden or autocast's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.kernels.arguments import check_tensors
from trunkline.kernels.column_sums import column_sums
from trunkline.kernels.first_order import no_forward_mode, no_second_order
from trunkline.kernels.masked_mse import check, masked_mse, runs_on_triton
from trunkline.kernels.operators import Operator
from trunkline.kernels.triton_path import jit, num_multiprocessors, tl, triton

BLOCK_D, MAX_PARTS = 128, 4  # 16 lanes a row: no row's sum goes through shared memory; longer rows in parts of 512
TILE, NUM_WARPS, PROGRAMS_PER_SM, STAGES = 2048, 4, 8, 3
BACKWARD_TILE, BACKWARD_NUM_WARPS, BACKWARD_PROGRAMS_PER_SM, BACKWARD_STAGES = 1024, 2, 16, 2


@jit
def _linear_masked_mse_fwd_kernel(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    bias,
    target,
    mask,
    error,
    partials,
    N,
    d,
    stride,
    HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr,
    MAX_UNROLLED: tl.constexpr,
    STAGES: tl.constexpr,
):
    b = tl.load(bias).to(tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    count = tl.zeros([BLOCK_N], tl.float32)
    next_m = _weights(mask, tl.program_id(0), N, BLOCK_N, HAS_MASK)
    for tile in tl.range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = row < N
        m, counts = next_m.to(tl.float32), next_m != 0
        next_m = _weights(mask, tile + tl.num_programs(0), N, BLOCK_N, HAS_MASK)
        products = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        if PARTS <= MAX_UNROLLED:
            for part in tl.static_range(PARTS):
                products += _products(hidden, weight, row, counts, part, d, stride, BLOCK_D)
        else:
            for part in range(PARTS):
                products += _products(hidden, weight, row, counts, part, d, stride, BLOCK_D)
        t = tl.load(target + row, mask=inside, other=0).to(tl.float32)
        difference = tl.where(counts, tl.sum(products, 1) + b - t, 0.0)
        e = m * difference
        tl.store(error + row, e, mask=inside)
        total += e * difference
        count += m
    tl.store(partials + tl.program_id(0) * 2, tl.sum(total))
    tl.store(partials + tl.program_id(0) * 2 + 1, tl.sum(count))


@jit
def _products(hidden, weight, row, counts, part, d, stride, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """h w [BLOCK_N, BLOCK_D] of one part of the columns."""
    column = part * BLOCK_D + tl.arange(0, BLOCK_D)
    some = counts[:, None] & (column < d)[None, :]
    h = tl.load(hidden + row[:, None] * stride + column[None, :], mask=some, other=0).to(tl.float32)
    w = tl.load(weight + column, mask=column < d, other=0).to(tl.float32)
    return h * w[None, :]


@jit
def _weights(mask, tile, N, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr):  # type: ignore[no-untyped-def]
    """m of a tile's rows, as they are stored; 0 past the last."""
    row = tl.cast(tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_MASK:
        return tl.load(mask + row, mask=row < N, other=0)
    else:
        return row < N


@jit
def _linear_masked_mse_bwd_kernel(  # type: ignore[no-untyped-def]
    grad_sum,
    hidden,
    weight,
    error,
    grad_hidden,
    grad_target,
    partials,
    N,
    d,
    stride,
    NEED_HIDDEN: tl.constexpr,
    NEED_LINEAR: tl.constexpr,
    NEED_TARGET: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    program, part = tl.program_id(0), tl.program_id(1)
    scale = 2.0 * tl.load(grad_sum)
    column = part * BLOCK_D + tl.arange(0, BLOCK_D)
    w = tl.load(weight + column, mask=column < d, other=0).to(tl.float32)
    weight_sum = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    bias_sum = tl.zeros([BLOCK_N], tl.float32)
    first = tl.cast(program, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    next_e = tl.load(error + first, mask=first < N, other=0)
    for tile in tl.range(program, tl.cdiv(N, BLOCK_N), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside, ahead = row < N, row + tl.num_programs(0) * BLOCK_N
        e = next_e
        next_e = tl.load(error + ahead, mask=ahead < N, other=0)
        counts = e != 0
        e = tl.where(counts, scale * e, 0.0)
        some = counts[:, None] & (column < d)[None, :]
        if NEED_HIDDEN:
            gradient = (e[:, None] * w[None, :]).to(grad_hidden.dtype.element_ty)
            place = inside[:, None] & (column < d)[None, :]
            tl.store(grad_hidden + row[:, None] * d + column[None, :], gradient, mask=place)
        if NEED_LINEAR:
            h = tl.load(hidden + row[:, None] * stride + column[None, :], mask=some, other=0).to(tl.float32)
            weight_sum += e[:, None] * h
            bias_sum += e
        if NEED_TARGET and part == 0:
            tl.store(grad_target + row, (-e).to(grad_target.dtype.element_ty), mask=inside)
    if NEED_LINEAR:
        out = partials + tl.cast(program, tl.int64) * (d + 1)
        tl.store(out + column, tl.sum(weight_sum, 0), mask=column < d)
        if part == 0:
            tl.store(out + d, tl.sum(bias_sum))


def _tiling(hidden: Tensor, tile: int, num_warps: int, per_sm: int, stages: int) -> tuple[Tensor, int, dict[str, int]]:
    """hidden as rows [N, d] of any stride, the number of programs, and the kernels' arguments that say the sizes."""
    d = hidden.shape[-1]
    rows = hidden.reshape(hidden.shape[:-1].numel(), d)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    N = rows.shape[0]
    block_d = min(BLOCK_D if d <= MAX_PARTS * BLOCK_D else 512, triton.next_power_of_2(d))
    block_n = tile // block_d
    programs = max(1, min(triton.cdiv(N, block_n), per_sm * num_multiprocessors(hidden.device)))
    numbers = {"N": N, "d": d, "stride": rows.stride(0), "BLOCK_N": block_n, "BLOCK_D": block_d}
    return rows, programs, numbers | {"STAGES": stages, "num_warps": num_warps}


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    rows, programs, numbers = _tiling(hidden, TILE, NUM_WARPS, PROGRAMS_PER_SM, STAGES)
    partials = torch.empty(programs, 2, dtype=torch.float32, device=hidden.device)
    error = torch.empty(target.shape, dtype=torch.float32, device=hidden.device)
    with torch.cuda.device_of(hidden):
        _linear_masked_mse_fwd_kernel[(programs,)](
            rows,
            weight.contiguous(),
            bias,
            target.contiguous(),
            target if mask is None else mask.expand(target.shape).contiguous(),
            error,
            partials,
            HAS_MASK=mask is not None,
            PARTS=triton.cdiv(numbers["d"], numbers["BLOCK_D"]),
            MAX_UNROLLED=MAX_PARTS,
            **numbers,
        )
        return column_sums(partials), error


def _fake_forward(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(2, dtype=torch.float32), target.new_empty(target.shape, dtype=torch.float32)


def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    error: Tensor,
    target_dtype: torch.dtype,
    need_hidden: bool,
    need_linear: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, programs, numbers = _tiling(
        hidden, BACKWARD_TILE, BACKWARD_NUM_WARPS, BACKWARD_PROGRAMS_PER_SM, BACKWARD_STAGES
    )
    parts = triton.cdiv(numbers["d"], numbers["BLOCK_D"])
    programs = triton.cdiv(programs, parts)
    partials = torch.empty(programs, numbers["d"] + 1, dtype=torch.float32, device=hidden.device)
    grad_hidden, grad_linear, grad_target = _gradients(
        grad, hidden, weight, error, target_dtype, need_hidden, need_linear, need_target
    )
    with torch.cuda.device_of(hidden):
        _linear_masked_mse_bwd_kernel[(programs, parts)](
            grad.contiguous(),
            rows,
            weight.contiguous(),
            error,
            grad_hidden,
            grad_target,
            partials,
            NEED_HIDDEN=need_hidden,
            NEED_LINEAR=need_linear,
            NEED_TARGET=need_target,
            **numbers,
        )
        if need_linear:
            grad_linear = column_sums(partials)
    return grad_hidden, grad_linear, grad_target


def _gradients(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    error: Tensor,
    target_dtype: torch.dtype,
    need_hidden: bool,
    need_linear: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        error.new_empty(len(weight) + 1 if need_linear else 0),
        error.new_empty(error.shape if need_target else 0, dtype=target_dtype),
    )


forward = Operator("linear_masked_mse", _forward, _fake_forward)
"""[2] fp32, sum and count; and e like target, fp32."""
backward = Operator("linear_masked_mse_backward", _backward, _gradients)
"""The gradients of hidden, of weight and bias in a row [d + 1] fp32, and of target; empty where not needed."""


class _LinearMaskedMse(torch.autograd.Function):
    """apply(hidden, weight, bias, target, mask)[0] is [2] fp32: sum, count."""

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        sums, error = forward(hidden, *arguments)
        return sums, error, sums.new_empty(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, bias, target, _ = inputs
        _, error, link = output
        ctx.save_for_backward(link, hidden, weight, error)
        ctx.bias_shape, ctx.bias_dtype, ctx.target_dtype = bias.shape, bias.dtype, target.dtype
        ctx.mark_non_differentiable(error)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        link, hidden, weight, error = ctx.saved_tensors
        need_hidden, need_weight, need_bias, need_target, _ = ctx.needs_input_grad
        grad_hidden, grad_linear, grad_target = backward(
            grad, hidden, weight, error, ctx.target_dtype, need_hidden, need_weight or need_bias, need_target
        )
        needed = (
            grad_hidden if need_hidden else None,
            grad_linear[:-1].to(weight.dtype) if need_weight else None,
            grad_linear[-1].to(ctx.bias_dtype).view(ctx.bias_shape) if need_bias else None,
            grad_target if need_target else None,
        )
        return *no_second_order("linear_masked_mse", link, grad, *needed), None


def linear_masked_mse(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(sum, count) of masked_mse for the prediction hidden @ weight + bias, two fp32 scalars.

    hidden [..., d], weight [d], bias [] or [1], target [...], `mask` broadcastable to target; any floating dtypes, of
    which weight and bias may differ from hidden. Differentiable in all but the mask.

    Raises ValueError for arguments that do not fit together.
    """
    check_tensors(hidden=hidden, weight=weight, bias=bias, target=target)
    if hidden.dim() < 1 or hidden.shape[-1] < 1 or weight.shape != hidden.shape[-1:]:
        raise ValueError(
            f"weight must be [{hidden.shape[-1] if hidden.dim() else 'd'}], the last dimension of hidden "
            f"{list(hidden.shape)}, of at least 1; got {list(weight.shape)}"
        )
    if bias.numel() != 1 or bias.dim() > 1:
        raise ValueError(f"bias must be one number, of shape [] or [1]; got {list(bias.shape)}")
    for name, x in (("weight", weight), ("bias", bias)):
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating; got {x.dtype}")
        if x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device}, hidden on {hidden.device}; they must be on one device")
    check(hidden[..., 0], target, mask, "hidden")
    if runs_on_triton(hidden, weight, bias, target, mask):
        no_forward_mode("linear_masked_mse", hidden, weight, bias, target)
        total, count = _LinearMaskedMse.apply(hidden, weight, bias, target, mask)[0].unbind()
        return total, count.detach()
    if mask is not None:  # of a row that does not count nothing may reach the gradient of weight, not even 0 x NaN
        hidden = hidden.masked_fill((mask == 0).expand(target.shape)[..., None], 0)
    weight, bias = weight.to(hidden.dtype), bias.to(hidden.dtype)
    return masked_mse(F.linear(hidden, weight[None], bias.reshape(1)).squeeze(-1), target, mask)
