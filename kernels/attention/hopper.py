"""hopper_forward, hopper_backward: where the kernels for Hopper GPUs (sm_90) serve, and whether they can be loaded.

They serve CUDA tensors of compute capability 9.0 in bf16 or fp16, with the head dimensions of HOPPER_FORWARD and
HOPPER_BACKWARD, at least FEWEST_ROWS queries, and FEWEST_TILES tiles of them. The backward one adds dQ in any order and
holds one query head for each key head: it serves neither deterministic mode nor heads that share keys. forward.py and
backward.py serve everything else.

The kernels are written in Gluon, a part of Triton that changes from version to version. Versions 3.6 to 3.9 compile
them. Gluon has no interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from trunkline.kernels.attention.tiles import HOPPER_BACKWARD, HOPPER_FORWARD, Tile, architecture_of
from trunkline.kernels.triton_path import INTERPRETED, triton

FEWEST_ROWS, FEWEST_TILES = 1024, 512
"""On an H200, with 132 multiprocessors, the plain kernels were as fast or faster below these: with their smaller tiles
less is left of a sequence's last one, and of the last round of programs."""


def hopper_forward(q: Tensor) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """launch_forward_hopper if it serves q [B, N, Hq, D], else None."""
    kernels = hopper_kernels() if _serves(HOPPER_FORWARD, q) else None
    return kernels and kernels[0]


def hopper_backward(q: Tensor, k: Tensor, deterministic: bool) -> Callable[..., tuple[Tensor, Tensor, Tensor]] | None:
    """launch_backward_hopper if it serves q [B, N, Hq, D] and k [B, M, Hkv, D], else None."""
    one_head_each = q.shape[2] == k.shape[2]
    kernels = hopper_kernels() if one_head_each and not deterministic and _serves(HOPPER_BACKWARD, q) else None
    return kernels and kernels[1]


def _serves(tiles: dict[int, Tile], q: Tensor) -> bool:
    if not q.is_cuda or q.element_size() != 2 or q.shape[-1] not in tiles:
        return False
    B, N, H, _ = q.shape
    rows = max(tiles[q.shape[-1]][:2])  # 192: of queries, or of as many keys
    if N < FEWEST_ROWS or B * H * -(-N // rows) < FEWEST_TILES:
        return False
    return architecture_of(q.device) == 90  # which is no ROCm device


@functools.cache
def hopper_kernels() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """(launch_forward_hopper, launch_backward_hopper), or None without Triton 3.6 to 3.9 and its Gluon."""
    if triton is None or INTERPRETED:
        return None
    if not (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 9):
        return None
    try:
        from trunkline.kernels.attention.backward_hopper import launch_backward_hopper
        from trunkline.kernels.attention.forward_hopper import launch_forward_hopper
    except ImportError:
        return None
    return launch_forward_hopper, launch_backward_hopper
