"""Where the Triton kernels run: on CUDA tensors, and under Triton's interpreter.

    from trunkline.kernels.triton_path import available, jit, tl

Everything imports without Triton too. It is read once, at import, whether Triton interprets, as `triton.jit` does.
"""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a GPU needs none
    triton = tl = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def available(tensor: Tensor) -> bool:
    """Whether a kernel can run on this tensor."""
    return triton is not None and (tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu"))


def jit(function: Any) -> Any:
    """triton.jit, or the function as it is where there is no Triton to run it.

    Kernels learn nothing from the values of arguments named "..._stride_..." or "seed...": one compiled kernel serves
    all of them.
    """
    if triton is None:
        return function
    names = inspect.signature(function).parameters
    return triton.jit(function, do_not_specialize=[x for x in names if "_stride_" in x or x.startswith("seed")])


def num_multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 1 for the interpreter, whose programs run one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
