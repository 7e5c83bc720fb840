"""first_order: second derivatives and forward mode, which our kernels do not have, are errors that name the function.

    q, k, v = first_order("flash_attention", q, k, v)      before operators of torch.library that launch kernels
    no_second_order(...), no_forward_mode(...)             in an autograd.Function of our own

Left to itself, torch takes a gradient that was kept, rather than computed from the inputs, for a constant, and gives
operators a tangent of zero.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor


def first_order(name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as they are, for kernels.<name> to work on.

    RuntimeError where one of them has a tangent (torch.func.jvp, torch.autograd.forward_ad), and where a gradient that
    reaches them is differentiated. Compiled code is left alone: torch.compile refuses second derivatives by itself.
    """
    if torch.compiler.is_compiling():
        return tensors
    return _FirstOrder.apply(name, *tensors)[:-1]


def no_second_order(name: str, output: Tensor, upstream: Tensor, *gradients: Tensor | None) -> tuple[Any, ...]:
    """The gradients as they are; RuntimeError where they are differentiated.

    Through the function's output, or any one of several, a second derivative in each of its inputs leads by here;
    through `upstream` one in the gradient of the output.
    """
    return gradients if torch.compiler.is_compiling() else _Gradients.apply(name, output, upstream, *gradients)


def no_forward_mode(name: str) -> NoReturn:
    """RuntimeError."""
    raise RuntimeError(f"kernels.{name} has no forward-mode derivative (jvp); use reverse mode, backward()")


class _FirstOrder(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return *(x.view_as(x) for x in tensors), tensors[0].new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.name, *tensors = inputs
        ctx.mark_non_differentiable(*(y for x, y in zip(tensors, output, strict=False) if not x.requires_grad))
        ctx.save_for_backward(output[-1])  # a link that keeps none of the tensors in memory
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (link,) = ctx.saved_tensors  # the operators see to what comes from upstream
        return None, *no_second_order(ctx.name, link, link, *gradients[:-1])

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> NoReturn:
        no_forward_mode(ctx.name)


class _Gradients(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, output: Tensor, upstream: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if x is None else x.view_as(x) for x in gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.name = inputs[0]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> NoReturn:
        raise RuntimeError(f"kernels.{ctx.name} is differentiable once; its gradient has no derivative")

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> NoReturn:
        no_forward_mode(ctx.name)
