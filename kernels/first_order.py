"""first_order: derivatives that a kernel does not have are errors that name it.

    q, k, v = first_order("flash_attention", q, k, v)      before what is composed of torch's operators
    no_forward_mode(...)                                   before an autograd.Function of our own
    no_second_order(...)                                   in its backward

Left to itself, torch takes a gradient that was kept, rather than computed from the inputs, for a constant, and gives
operators a tangent of zero.

The `link` of a Function is one more output, a scalar that no caller sees. Kept for backward, it leads from gradients
to every input. An output could do so too, but its user may change it in place; an input would stay in memory, even a
weight that is sharded again after its forward.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad


def first_order(name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as they are, for kernels.<name> to work on.

    RuntimeError where one of them has a tangent (torch.func.jvp, torch.autograd.forward_ad), and where a gradient that
    reaches them is differentiated. Compiled code is left alone: torch.compile refuses second derivatives by itself.
    """
    if torch.compiler.is_compiling():
        return tensors
    return _FirstOrder.apply(name, *tensors)[:-1]


def no_second_order(name: str, link: Tensor, upstream: Tensor, *gradients: Tensor | None) -> tuple[Any, ...]:
    """The gradients as they are; RuntimeError where they are differentiated.

    Through `link` a second derivative in each input of the function leads by here; through `upstream` one in the
    gradient of its output.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # the latter only without create_graph
        return gradients
    return _Gradients.apply(name, link, upstream, *gradients)


def no_forward_mode(name: str, *tensors: Tensor | None) -> None:
    """RuntimeError where one of them has a tangent. A `jvp` would do so too, but torch.compile traces none."""
    if torch.compiler.is_compiling():
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        _refuse_forward_mode(name)


def _refuse_forward_mode(name: str) -> NoReturn:
    raise RuntimeError(f"{name} has no forward-mode derivative (jvp); use reverse mode, backward()")


class _FirstOrder(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return *(x.view_as(x) for x in tensors), tensors[0].new_empty(())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.name, *tensors = inputs
        ctx.mark_non_differentiable(*(y for x, y in zip(tensors, output, strict=False) if not x.requires_grad))
        ctx.save_for_backward(output[-1])  # the link
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (link,) = ctx.saved_tensors  # the operators see to what comes from upstream
        return None, *no_second_order(ctx.name, link, link, *gradients[:-1])

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> NoReturn:
        _refuse_forward_mode(ctx.name)


class _Gradients(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, link: Tensor, upstream: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if x is None else x.view_as(x) for x in gradients)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        ctx.name = inputs[0]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> NoReturn:
        raise RuntimeError(f"{ctx.name} is differentiable once; its gradient has no derivative")

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> NoReturn:
        _refuse_forward_mode(ctx.name)
