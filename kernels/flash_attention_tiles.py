"""choose_tile: how many queries and keys a program of flash_attention works on at once, and with how many warps.

A static table, so that a user's first step tunes nothing. `python -m kernels.compile_gate` prints what each entry needs in
registers and shared memory; a launch function's `tile` overrides its entry, which is what a sweep on a device uses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    block_m: int  # queries
    block_n: int  # keys
    num_warps: int
    num_stages: int


# (architecture, bits of an element, pass) -> head dimension, as a power of two -> tile
TILES = {
    (90, 16, "forward"): {
        16: Tile(128, 128, 4, 3),
        32: Tile(128, 128, 4, 3),
        64: Tile(128, 128, 8, 3),
        128: Tile(128, 128, 8, 2),
        256: Tile(128, 64, 8, 2),
    },
    (90, 16, "backward"): {
        16: Tile(64, 128, 8, 2),
        32: Tile(64, 128, 8, 2),
        64: Tile(64, 128, 8, 2),
        128: Tile(64, 128, 8, 2),
        256: Tile(64, 64, 8, 1),
    },
    (90, 16, "backward_dq"): {
        16: Tile(128, 64, 4, 3),
        32: Tile(128, 64, 4, 3),
        64: Tile(128, 64, 4, 3),
        128: Tile(128, 64, 8, 2),
        256: Tile(64, 64, 8, 1),
    },
    (80, 16, "forward"): {
        16: Tile(128, 64, 4, 3),
        32: Tile(128, 64, 4, 3),
        64: Tile(128, 64, 4, 3),
        128: Tile(128, 64, 8, 3),
        256: Tile(64, 32, 4, 2),
    },
    (80, 16, "backward"): {
        16: Tile(64, 128, 8, 2),
        32: Tile(64, 128, 8, 2),
        64: Tile(64, 128, 8, 2),
        128: Tile(64, 64, 8, 1),
        256: Tile(32, 32, 8, 1),
    },
    (80, 16, "backward_dq"): {
        16: Tile(64, 64, 4, 3),
        32: Tile(64, 64, 4, 3),
        64: Tile(64, 64, 4, 3),
        128: Tile(64, 64, 8, 2),
        256: Tile(32, 32, 4, 1),
    },
    (90, 32, "forward"): {d: Tile(32, 32, 4, 2) for d in (16, 32, 64, 128, 256)},
    (90, 32, "backward"): {d: Tile(32, 32, 8, 1) for d in (16, 32, 64, 128, 256)},
    (90, 32, "backward_dq"): {d: Tile(32, 32, 8, 1) for d in (16, 32, 64, 128, 256)},
}
TILES |= {(80, 32, name): TILES[90, 32, name] for name in ("forward", "backward", "backward_dq")}


def choose_tile(name: str, q: Tensor, block_d: int) -> Tile:
    """The tile of a pass, "forward", "backward" or "backward_dq", over q with the head dimension padded to block_d."""
    hopper = not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] in (9, 10)
    return TILES[90 if hopper else 80, 8 * q.element_size(), name][block_d]
