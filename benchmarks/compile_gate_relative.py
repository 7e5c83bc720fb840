"""What every shipped tile of relative_attention's kernels needs in registers and shared memory.

    python -m trunkline.benchmarks.compile_gate_relative

Compiles them for sm_90 and sm_80 without a GPU. What fails: registers spilled to memory, but for STACK bytes that the
inner loop hardly asks for; more shared memory than a program may have, for sm_80 on any architecture that has the same
tiles; 16-bit products without tensor cores; rows that are not loaded 16 bytes at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from trunkline.benchmarks.compile_gate import SHARED_MEMORY_LIMIT, STACK
from trunkline.benchmarks.offline_compiler import compile_for, gate, product_loops, resources, wide_loads
from trunkline.kernels.attention import relative_kernels
from trunkline.kernels.attention.relative_op import choose_tiles, padded
from trunkline.kernels.attention.tiles import Tile

KERNELS = {
    "forward": relative_kernels._relative_fwd_kernel,
    "backward_dq": relative_kernels._relative_bwd_dq_kernel,
    "backward_dkdv": relative_kernels._relative_bwd_dkdv_kernel,
}
LIMITS = {90: SHARED_MEMORY_LIMIT[90], 80: min(SHARED_MEMORY_LIMIT.values())}
HEAD_DIMS = (16, 24, 40, 64, 120, 128)


class Configuration(NamedTuple):
    architecture: int  # 90 for sm_90
    name: str  # of KERNELS
    dtype: str  # as Triton spells it
    head_dim: int
    causal: bool = True
    bias: bool = True  # and its gradient
    drops: bool = True

    @property
    def tile(self) -> Tile:
        tiles = choose_tiles(self.architecture, 32 if self.dtype == "fp32" else 16, self.head_dim)
        return tiles[list(KERNELS).index(self.name)]

    def __str__(self) -> str:
        pattern = "+".join(name for name in ("causal", "bias", "drops") if getattr(self, name)) or "plain"
        return f"sm_{self.architecture} {self.name} {self.dtype} D={self.head_dim} {pattern}"


class Usage(NamedTuple):
    registers: int
    spilled_bytes: int
    spills_in_loop: int  # instructions
    shared_bytes: int
    tensor_cores: bool
    wide_loads: int
    loop: int  # instructions of the inner loop; 0 where it has no tensor cores, by which it is found


def configurations(every: bool) -> Iterator[Configuration]:
    """All of them, or those with the most code, in bf16 and fp32."""
    patterns = itertools.product((True, False), repeat=3) if every else [(True, True, True)]
    dtypes = ("bf16", "fp16", "fp32") if every else ("bf16", "fp32")
    for each in itertools.product(LIMITS, KERNELS, dtypes, HEAD_DIMS, patterns):
        yield Configuration(*each[:4], *each[4])


def measure(configuration: Configuration) -> Usage:
    """Compile one configuration and read what it needs off the code."""
    compiled = _compile(configuration)
    usage, ptx = resources(compiled), compiled.asm["ptx"]
    loop = (product_loops(compiled) or [[]])[0]
    return Usage(
        usage["REG"],
        max(usage["STACK"], usage["LOCAL"]),
        sum(x.name.startswith(("LDL", "STL")) for x in loop),
        compiled.metadata.shared,
        "wgmma.mma_async" in ptx or "mma.sync" in ptx,
        wide_loads(ptx),
        len(loop),
    )


def limits_broken(configuration: Configuration, usage: Usage) -> list[str]:
    """What fails the gate, in words."""
    broken = []
    if usage.spilled_bytes > (STACK if 100 * usage.spills_in_loop < usage.loop else 0):
        broken.append(f"spills {usage.spilled_bytes} bytes")
    if usage.shared_bytes > LIMITS[configuration.architecture]:
        broken.append(f"needs {usage.shared_bytes} bytes of shared memory")
    if configuration.dtype != "fp32" and not usage.tensor_cores:
        broken.append("no tensor cores")
    if usage.wide_loads < (least := least_wide_loads(configuration)):
        broken.append(f"{usage.wide_loads} loads of 16 bytes, not {least}")
    return broken


def least_wide_loads(configuration: Configuration) -> int:
    """Those of a thread that bring in each of the tiles once."""
    tile = configuration.tile
    queries = {"forward": 1, "backward_dq": 3, "backward_dkdv": 2}[configuration.name]
    row_bytes = padded(configuration.head_dim) * (4 if configuration.dtype == "fp32" else 2)
    of_queries, of_keys = (rows * row_bytes // (16 * 32 * tile.num_warps) for rows in (tile.block_m, tile.block_n))
    return queries * of_queries + 2 * of_keys


def _compile(configuration: Configuration) -> Any:
    tile, head_dim = configuration.tile, configuration.head_dim
    constants = {
        "D": head_dim, "BLOCK_D": padded(head_dim), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "CAUSAL": configuration.causal, "HAS_BIAS": configuration.bias, "BIAS_LEARNS": configuration.bias,
        "DROPS": configuration.drops,
    }  # fmt: skip

    def type_of(argument: str) -> str:
        if argument in ("q", "k", "v", "out", "d_out", "dq", "dk", "dv"):
            return f"*{configuration.dtype}"
        if argument in ("bias", "lse", "delta", "diagonals"):
            return "*fp32"
        if argument.endswith("document"):
            return "*i64"
        return "fp32" if argument in ("scale", "rescale") else "i32"

    kernel = KERNELS[configuration.name]
    return compile_for(configuration.architecture, kernel, constants, type_of, lambda _: False, tile.options())


def main() -> None:
    gate(__doc__, "not the one with most code", configurations, looked_at)


def looked_at(configuration: Configuration) -> tuple[str, list[str]]:
    """Its line of the table, and what fails the gate."""
    usage, tile = measure(configuration), configuration.tile
    row = (
        f"{configuration!s:56} {tile.block_m:3} x {tile.block_n:3}, {tile.num_warps} warps: "
        f"{usage.registers:3} registers, {usage.spilled_bytes:2} bytes spilled, "
        f"{usage.shared_bytes / 1024:5.1f} KiB shared"
    )
    if usage.loop:
        a_score = usage.loop * 32 * tile.num_warps / (tile.block_m * tile.block_n)
        row += f", {a_score:4.1f} instructions a score, {usage.spills_in_loop} spills in the loop"
    return row, limits_broken(configuration, usage)


if __name__ == "__main__":
    main()
