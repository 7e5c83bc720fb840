"""Operator: a function that launches kernels, as torch sees it where it traces.

    forward = Operator("flash_attention", launch, fake)        forward(q, ...), within an autograd.Function

torch.compile, fake tensors, transforms of torch.func and dispatch modes need a registered operator, and get
trunkline::flash_attention. Calling one takes longer than a kernel for a short sequence does. So everything else gets
the function itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


class Operator:
    """Call it with positional arguments; what it gives has no gradient of its own.

    Args:
        name: of the operator, after "trunkline::".
        function: launches the kernels. Its annotations make the operator's schema.
        fake: the same on tensors without data: it makes the outputs alone.
    """

    def __init__(self, name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
        self.function = function
        self.operator = torch.library.custom_op(f"trunkline::{name}", function, mutates_args=())
        self.operator.register_fake(fake)

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _is_traced(arguments):
            return self.operator(*arguments)
        with torch.no_grad():
            return self.function(*arguments)


def _is_traced(arguments: tuple[Any, ...]) -> bool:
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return True
    return any(isinstance(x, Tensor) and type(x) not in _PLAIN for x in arguments)
