"""flash_attention_op: the Triton kernels of flash_attention as one operator of torch, with its gradient.

torch.compile sees it as a leaf, with shapes from the fake functions; autograd saves the inputs, the output and one fp32
number a row and head. hopper.py says where a kernel for Hopper GPUs serves; forward.py and backward.py serve elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trunkline.kernels.attention.backward import launch_backward
from trunkline.kernels.attention.forward import launch_forward
from trunkline.kernels.attention.hopper import hopper_backward, hopper_forward


@torch.library.custom_op("trunkline::flash_attention", mutates_args=())
def flash_attention_op(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, causal_block: int | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) of checked arguments with at least one query and one key, D a multiple of 8."""
    launch = hopper_forward(q) or launch_forward
    return launch(q, k, v, key_mask, causal_block, softmax_scale)


@flash_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, causal_block: int | None, softmax_scale: float):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@torch.library.custom_op("trunkline::flash_attention_backward", mutates_args=())
def _backward_op(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    causal_block: int | None,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    deterministic = torch.are_deterministic_algorithms_enabled()
    if launch := hopper_backward(q, k, deterministic):
        return launch(d_out, q, k, v, out, lse, key_mask, causal_block, softmax_scale)
    return launch_backward(d_out, q, k, v, out, lse, key_mask, causal_block, softmax_scale, deterministic)


@_backward_op.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, key_mask, ctx.causal_block, ctx.softmax_scale = inputs
    ctx.save_for_backward(q, k, v, key_mask, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, d_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, key_mask, out, lse = ctx.saved_tensors
    gradients = _backward_op(d_out, q, k, v, out, lse, key_mask, ctx.causal_block, ctx.softmax_scale)
    return *gradients, None, None, None


flash_attention_op.register_autograd(_backward, setup_context=_save)
