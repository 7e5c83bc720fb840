"""What both Hopper kernels share: how tiles get into shared memory, and how warps divide a program's registers.

Hopper's tensor memory accelerator (TMA) copies a tile between global and shared memory by itself. It reads the tensor's
address, shape and strides from a descriptor, which the host makes at each launch. Strides and addresses are multiples
of 16 bytes, but for the last stride, which is 1 element. Elements past the end of a dimension read as 0.

A program has one warpgroup (four warps) that loads tiles, and CONSUMERS warpgroups that compute. All threads start with
as many registers. The warpgroup that loads then leaves most of its own to the consumers.

This module needs Gluon; hopper.py says where that is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from trunkline.kernels.attention.forward import addressable

LOADING_WARPS = 4
CONSUMERS = gl.constexpr(3)
CONSUMER_REGISTERS = gl.constexpr(160)  # a thread; a loading thread keeps 32 of the 128 that each starts with

# earlier versions of Triton have other names for these
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


def descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    """For TMA to read or add to x in tiles of the shape `block`, which has as many dimensions as x."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, shared_layout(block, x.dtype))


def shared_layout(block: list[int], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """The order of a tile's elements in shared memory, as TMA writes and the tensor cores read it."""
    # fp16 and bf16 have one layout
    return gl.NVMMASharedLayout.get_default_for(block, gl.float32 if dtype == torch.float32 else gl.bfloat16)


def describable(x: Tensor) -> Tensor:
    """x, or a copy that a descriptor can describe: `addressable`, and with no stride of 0."""
    x = addressable(x)
    return x if all(x.stride()) else x.clone(memory_format=torch.contiguous_format)
