"""choose_tile: queries and keys per program of flash_attention, and its warps.

A static table, so that a user's first step tunes nothing. `python -m trunkline.benchmarks.compile_gate` prints what
each entry needs in registers and shared memory, and what its inner loop asks for; `launchers/bench.py attention
--sweep forward` times others on a device. Those of Hopper with head dimensions of 32 and 64 were timed on an H200.
The others were chosen by their machine code, among tiles that pass the gate: by the fewest instructions a score and by
how many programs share a multiprocessor.
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
    max_registers: int = 255  # a thread; with 128 or 168, four or three programs of 4 warps share a multiprocessor

    def options(self) -> dict[str, int]:
        """For Triton's launches and its compiler; multiply-adds fused also where a later Triton does not by default."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options if torch.version.hip else options | {"maxnreg": self.max_registers}  # ROCm has no such option


# (architecture, bits of an element, pass) -> head dimension, as a power of two -> tile
TILES = {
    (90, 16, "forward"): {
        16: Tile(64, 64, 4, 3, 128),
        32: Tile(64, 64, 4, 3, 128),
        64: Tile(64, 64, 4, 3, 168),
        128: Tile(128, 64, 8, 3),
        256: Tile(128, 32, 8, 2),
    },
    (90, 16, "backward"): {
        16: Tile(64, 64, 4, 3, 168),
        32: Tile(64, 64, 4, 3, 168),
        64: Tile(64, 64, 4, 3),
        128: Tile(64, 64, 8, 1),
        256: Tile(16, 64, 8, 1),
    },
    (90, 16, "backward_dq"): {
        16: Tile(64, 64, 4, 3, 168),
        32: Tile(64, 64, 4, 3, 168),
        64: Tile(64, 64, 4, 3, 168),
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
# 99 KiB, not 163
TILES |= {
    (86, 16, "forward"): TILES[80, 16, "forward"] | {256: Tile(64, 32, 8, 1)},
    (86, 16, "backward"): TILES[80, 16, "backward"],
    (86, 16, "backward_dq"): TILES[80, 16, "backward_dq"],
}
# no warp-group products, whose operands stay out of registers
_SMALL_HEADS = dict.fromkeys((16, 32, 64), Tile(128, 64, 8, 3))
TILES |= {
    (100, 16, "forward"): TILES[90, 16, "forward"] | _SMALL_HEADS,
    (100, 16, "backward"): TILES[90, 16, "backward"]
    | dict.fromkeys((16, 32), Tile(64, 128, 8, 3))
    | {64: Tile(64, 128, 8, 2)},
    (100, 16, "backward_dq"): TILES[90, 16, "backward_dq"] | _SMALL_HEADS,
}
# 99 KiB too, and an assembler that takes a few registers more
TILES |= {
    (120, 16, "forward"): TILES[86, 16, "forward"] | {128: Tile(64, 64, 8, 2)},
    (120, 16, "backward"): TILES[86, 16, "backward"] | dict.fromkeys((16, 32), Tile(32, 128, 8, 2)),
    (120, 16, "backward_dq"): TILES[86, 16, "backward_dq"],
}
# head dimension -> tile of forward_hopper.py and of backward_hopper.py, for 16 bits, where it is faster than the plain
# kernel. num_warps are the three warpgroups that multiply; four more warps load, and all 16 start with 128 registers
HOPPER_FORWARD = dict.fromkeys((32, 64), Tile(192, 128, 12, 4, 128))
HOPPER_BACKWARD = dict.fromkeys((32, 64), Tile(64, 192, 12, 4, 128))
ARCHITECTURES = {80: 80, 86: 86, 87: 80, 89: 86, 90: 90, 100: 100, 103: 100, 110: 100, 120: 120, 121: 120}
"""Compute capability, 90 for 9.0 -> whose entries of TILES it uses."""
# no tensor cores there: one tile for all
TILES |= {
    (architecture, 32, name): tiles for architecture in ARCHITECTURES.values() for name, tiles in _FLOAT32.items()
}
TILES |= {
    (architecture, bits, "backward_delta"): dict.fromkeys((16, 32, 64, 128), Tile(64, 1, 4, 1))
    | {256: Tile(32, 1, 4, 1)}
    for architecture in ARCHITECTURES.values()
    for bits in (16, 32)
}


def choose_tile(name: str, q: Tensor, block_d: int) -> Tile:
    """The tile of a pass over q with the head dimension padded to block_d."""
    return TILES[architecture_of(q.device), 8 * q.element_size(), name][block_d]


def architecture_of(device: torch.device) -> int:
    """Whose entries of TILES a device uses; 90 where there is no GPU. Those that fit most serve what is not known.

    Raises ValueError for a GPU before compute capability 8.0.
    """
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(
            f"flash_attention needs a GPU of compute capability 8.0 or later; {torch.cuda.get_device_name(device)} "
            f"has {major}.{minor}"
        )
    return ARCHITECTURES.get(10 * major + minor, 120) if torch.version.hip is None else 86
