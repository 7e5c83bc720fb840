"""choose_tile: how many queries and keys a program of flash_attention works on at once, and with how many warps.

A static table, so that a user's first step tunes nothing. `python -m kernels.compile_gate` prints what each entry needs
in registers and shared memory, and what its inner loop asks for; `launchers/bench.py attention --sweep forward` times
others on a device. Chosen among tiles that spill nothing, by the fewest instructions a score and by how many programs
share a multiprocessor. Entries for 80 also serve other chips; those that lend a program less than an A100's 163 KiB of
shared memory may refuse head dimensions above 128.
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
    max_registers: int = 255  # a thread; with 128, two programs of 8 warps run side by side on a multiprocessor

    def options(self) -> dict[str, int]:
        """For Triton's launches and its compiler; multiply-adds fused also where a later Triton does not by default."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
            "enable_fp_fusion": True,
        }


# (architecture, bits of an element, pass) -> head dimension, as a power of two -> tile
TILES = {
    (90, 16, "forward"): {
        16: Tile(128, 64, 8, 3, 128),
        32: Tile(128, 64, 8, 3, 128),
        64: Tile(128, 64, 8, 3, 128),
        128: Tile(128, 64, 8, 3),
        256: Tile(128, 32, 8, 2),
    },
    (90, 16, "backward"): {
        16: Tile(64, 128, 8, 2),
        32: Tile(64, 128, 8, 2),
        64: Tile(64, 128, 8, 2),
        128: Tile(64, 64, 8, 1),
        256: Tile(16, 64, 8, 1),
    },
    (90, 16, "backward_dq"): {
        16: Tile(128, 64, 8, 3),
        32: Tile(128, 64, 8, 3),
        64: Tile(128, 64, 8, 2),
        128: Tile(128, 64, 8, 2),
        256: Tile(64, 32, 8, 2),
    },
    (80, 16, "forward"): {
        16: Tile(128, 64, 4, 3),
        32: Tile(128, 64, 4, 3),
        64: Tile(128, 32, 4, 3),
        128: Tile(128, 32, 8, 2),
        256: Tile(64, 32, 8, 2),
    },
    (80, 16, "backward"): {
        16: Tile(64, 128, 8, 2),
        32: Tile(64, 128, 8, 2),
        64: Tile(32, 64, 4, 2),
        128: Tile(32, 64, 8, 2),
        256: Tile(32, 32, 8, 1),
    },
    (80, 16, "backward_dq"): {
        16: Tile(128, 64, 8, 2),
        32: Tile(64, 64, 4, 2),
        64: Tile(128, 64, 8, 2),
        128: Tile(64, 64, 8, 1),
        256: Tile(32, 32, 4, 1),
    },
}
_FLOAT32 = {
    "forward": {
        16: Tile(32, 32, 4, 2),
        32: Tile(32, 32, 4, 2),
        64: Tile(32, 16, 4, 2),
        128: Tile(32, 16, 8, 1),
        256: Tile(16, 16, 8, 1),
    },
    "backward": {
        16: Tile(32, 32, 4, 1),
        32: Tile(32, 32, 4, 1),
        64: Tile(32, 32, 8, 1),
        128: Tile(16, 16, 8, 1),
        256: Tile(16, 16, 8, 1),
    },
    "backward_dq": {
        16: Tile(32, 32, 4, 1),
        32: Tile(32, 32, 4, 1),
        64: Tile(32, 32, 8, 1),
        128: Tile(16, 16, 8, 1),
        256: Tile(16, 16, 8, 1),
    },
}
# no tensor cores there: one tile for both
TILES |= {(architecture, 32, name): tiles for architecture in (90, 80) for name, tiles in _FLOAT32.items()}
TILES |= {
    (architecture, bits, "backward_delta"): dict.fromkeys((16, 32, 64, 128, 256), Tile(64, 1, 4, 1))
    for architecture in (90, 80)
    for bits in (16, 32)
}


def choose_tile(name: str, q: Tensor, block_d: int) -> Tile:
    """The tile of a pass over q with the head dimension padded to block_d."""
    return TILES[architecture_of(q.device), 8 * q.element_size(), name][block_d]


def architecture_of(device: torch.device) -> int:
    """Whose entries of TILES a device uses: 90 for Hopper and Blackwell, and where there is no GPU; else 80."""
    return 90 if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10) else 80
