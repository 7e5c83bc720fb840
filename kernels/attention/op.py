"""FlashAttention: the Triton kernels of flash_attention, with their gradient.

Autograd saves the inputs, the output and one fp32 number a row and head. hopper.py says where a kernel for Hopper GPUs
serves; forward.py and backward.py serve elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trunkline.kernels.attention.backward import launch_backward
from trunkline.kernels.attention.forward import launch_forward
from trunkline.kernels.attention.hopper import hopper_backward, hopper_forward
from trunkline.kernels.first_order import no_second_order
from trunkline.kernels.operators import Operator


def _forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, causal_block: int | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    launch = hopper_forward(q) or launch_forward
    return launch(q, k, v, key_mask, causal_block, softmax_scale)


def _backward(
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


def _fake_forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


def _fake_backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


forward = Operator("flash_attention", _forward, _fake_forward)
"""(out, lse) of checked arguments with at least one query and one key, D a multiple of 8."""
backward = Operator("flash_attention_backward", _backward, _fake_backward)
"""(dq, dk, dv) from what `forward` took and gave."""


class FlashAttention(torch.autograd.Function):
    """apply(q, k, v, key_mask, causal_block, softmax_scale)[0] is the output, which is differentiable once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        out, lse = forward(q, *arguments)
        return out, lse, out.new_empty(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, v, key_mask, ctx.causal_block, ctx.softmax_scale = inputs
        out, lse, link = output
        ctx.save_for_backward(link, q, k, v, out, lse, key_mask)
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        link, *saved = ctx.saved_tensors
        gradients = backward(d_out, *saved, ctx.causal_block, ctx.softmax_scale)
        return *no_second_order("flash_attention", link, d_out, *gradients), None, None, None
