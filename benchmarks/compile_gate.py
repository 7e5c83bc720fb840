"""What every shipped tile of flash_attention needs in registers and shared memory.

    python -m trunkline.benchmarks.compile_gate

Compiles the kernels for each architecture of SHARED_MEMORY_LIMIT with Triton and the assembler that it brings: no GPU
is needed. What would make a tile slow or unusable fails it: registers spilled to memory, but for a few around the loop;
more registers or shared memory than a multiprocessor lends to one program (CUDA C++ Programming Guide, "Compute
capabilities"); rows that are not loaded 16 bytes at a time; for 16-bit tiles, mask arithmetic in the loop that is to do
without, and on sm_90 products that are no warp-group instructions, or that the assembler had to put one after the other
for want of registers.

The table also counts what the inner loop, the one without mask arithmetic where there are two, asks of each
multiprocessor for a tile of scores, and says what is asked the most: tensor cores, exponentials (16 a clock) or issued
instructions (4 a clock). Were nothing else in the way, an H200 or A100 would run at the rate that follows. No kernel
does; but of two tiles it tells which one leaves less to wait for.
"""

from __future__ import annotations

import argparse
import itertools
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from trunkline.benchmarks.offline_compiler import compile_for, product_loops, resources, run_tool, wide_loads
from trunkline.kernels.attention import backward, forward
from trunkline.kernels.attention.tiles import ARCHITECTURES, TILES, Tile
from trunkline.kernels.triton_path import triton

REGISTERS = 65_536  # of a multiprocessor
STACK = 96  # bytes a thread that may wait there, as long as the inner loop hardly asks for them
SHARED_MEMORY_LIMIT = {
    architecture: kib * 1024 for architecture, kib in {90: 227, 80: 163, 86: 99, 89: 99, 100: 227, 120: 99}.items()
}


class Configuration(NamedTuple):
    architecture: int  # 90 for sm_90
    name: str  # of PASSES
    dtype: str  # as Triton spells it
    head_dim: int
    causal: bool
    masked: bool

    @property
    def tile(self) -> Tile:
        bits = 32 if self.dtype == "fp32" else 16
        name = "backward" if self.name in ("backward_gqa", "backward_dkdv") else self.name
        return TILES[ARCHITECTURES[self.architecture], bits, name][triton.next_power_of_2(self.head_dim)]

    @property
    def splits_loop(self) -> bool:
        """Whether the tiles that need no mask have a loop of their own."""
        if self.name in ("backward", "backward_gqa", "backward_dkdv"):
            return backward.split_loop(triton.next_power_of_2(self.head_dim), self.name == "backward_dkdv")
        return self.name != "backward_delta"

    @property
    def adds_tiles(self) -> bool:
        """Whether dQ is added to by a tensor descriptor, as launch_backward decides on a device."""
        one_pass = self.name in ("backward", "backward_gqa")
        return one_pass and self.architecture == 90 and self.dtype != "fp32" and self.head_dim <= 64

    def __str__(self) -> str:
        pattern = ("causal" if self.causal else "full") + ("+mask" if self.masked else "")
        return f"sm_{self.architecture} {self.name} {self.dtype} D={self.head_dim} {pattern}"


class Usage(NamedTuple):
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    wgmma: bool
    wgmma_serialized: bool
    wide_loads: int  # 16 bytes each
    loop: Counter[str]  # the machine instructions of the inner loop


class Chip(NamedTuple):
    flop_per_clock: int  # of a multiprocessor's tensor cores, bf16
    multiprocessors: int
    clock_hz: float


CHIPS = {90: Chip(4096, 132, 1.83e9), 80: Chip(2048, 108, 1.41e9)}
PRODUCTS = {"forward": 2, "backward": 5, "backward_gqa": 5}  # of tiles; 2 head_dim operations a score each

SHARES_TILES_WITH = {86: 80, 89: 86, 100: 90, 120: 86}  # most of them
HEAD_DIMS = (16, 24, 32, 40, 64, 72, 128, 256)
PATTERNS = ((True, True), (True, False), (False, True), (False, False))  # a causal block, a key mask
# "backward" is in one pass, "_gqa" where query heads share keys; "_dkdv" and "_dq" are the deterministic mode
PASSES = ("forward", "backward_delta", "backward", "backward_gqa", "backward_dkdv", "backward_dq")


def configurations(every: bool) -> Iterator[Configuration]:
    """All of them, or one for each tile of the 16-bit table, of some architectures for those that are their own alone:
    bf16, block-causal with a key mask, which holds the most code.

    Strides make no difference: no kernel learns anything from them. Nor does "backward_delta" from the pattern.
    """
    if every:
        for architecture, name in itertools.product(SHARED_MEMORY_LIMIT, PASSES):
            patterns = PATTERNS if name != "backward_delta" else PATTERNS[:1]
            for head_dim, dtype, pattern in itertools.product(HEAD_DIMS, ("bf16", "fp16", "fp32"), patterns):
                yield Configuration(architecture, name, dtype, head_dim, *pattern)
        return
    names = [name for name in PASSES if name != "backward_dkdv"]
    for architecture, name, head_dim in itertools.product(SHARED_MEMORY_LIMIT, names, (16, 32, 64, 128, 256)):
        configuration = Configuration(architecture, name, "bf16", head_dim, causal=True, masked=True)
        others = configuration._replace(architecture=SHARES_TILES_WITH.get(architecture, architecture)).tile
        if architecture not in SHARES_TILES_WITH or configuration.tile != others:
            yield configuration


def measure(configuration: Configuration) -> Usage:
    """Compile one configuration and read what it needs off the machine code."""
    from triton.backends.nvidia.compiler import get_ptxas

    compiled = _compile(configuration)
    usage, ptx, remarks = resources(compiled), compiled.asm["ptx"], ""
    if wgmma := "wgmma.mma_async" in ptx:
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
            file.write(ptx)
            file.flush()
            architecture = configuration.architecture
            assembler = get_ptxas(architecture).path
            remarks = run_tool(assembler, f"-arch=sm_{architecture}a", file.name, "-o", "/dev/null")
    serialized = "wgmma.mma_async instructions are serialized" in remarks
    loop = Counter(name.split(".")[0] for name in min(product_loops(compiled), key=len, default=[]))
    return Usage(
        usage["REG"], usage["STACK"], usage["LOCAL"], compiled.metadata.shared, wgmma, serialized, wide_loads(ptx), loop
    )


def limits_broken(configuration: Configuration, usage: Usage) -> list[str]:
    broken = []
    seldom = 100 * (usage.loop["LDL"] + usage.loop["STL"]) < usage.loop.total()
    if usage.local_bytes or usage.stack_bytes > (STACK if seldom else 0):
        broken.append(f"spills {max(usage.stack_bytes, usage.local_bytes)} bytes")
    if usage.registers * 32 * configuration.tile.num_warps > REGISTERS:
        broken.append("more registers than there are")
    if usage.shared_bytes > SHARED_MEMORY_LIMIT[configuration.architecture]:
        broken.append(f"needs {usage.shared_bytes} bytes of shared memory")
    multiplies_tiles = configuration.name != "backward_delta" and configuration.dtype != "fp32"
    if configuration.architecture == 90 and multiplies_tiles and not usage.wgmma:
        broken.append("no wgmma")
    if usage.wide_loads < (least := least_wide_loads(configuration)):
        broken.append(f"{usage.wide_loads} loads of 16 bytes, not {least}")
    if usage.wgmma_serialized:
        broken.append("wgmma serialized")
    if multiplies_tiles and not usage.loop:
        broken.append("no inner loop found")
    if configuration.splits_loop and usage.loop["FSEL"]:
        broken.append("mask arithmetic in the inner loop")
    return broken


def least_wide_loads(configuration: Configuration) -> int:
    """Those of a thread that bring in each of the tiles once; of one that is too small for its threads, none."""
    tile = configuration.tile
    queries, keys = {"forward": (1, 2), "backward_delta": (2, 0)}.get(configuration.name, (2, 2))
    row_bytes = triton.next_power_of_2(configuration.head_dim) * (4 if configuration.dtype == "fp32" else 2)
    of_queries, of_keys = (rows * row_bytes // (16 * 32 * tile.num_warps) for rows in (tile.block_m, tile.block_n))
    return queries * of_queries + keys * of_keys


def rate_limit(configuration: Configuration, usage: Usage) -> tuple[str, float] | None:
    """What the inner loop asks most of, and the useful TFLOP/s at which that would be busy all the time."""
    if configuration.name not in PRODUCTS or configuration.dtype == "fp32" or configuration.architecture not in CHIPS:
        return None
    tile, chip, head_dim = configuration.tile, CHIPS[configuration.architecture], configuration.head_dim
    flop_a_channel = 2 * PRODUCTS[configuration.name] * tile.block_m * tile.block_n
    clocks = {
        "tensor cores": flop_a_channel * triton.next_power_of_2(head_dim) / chip.flop_per_clock,
        "exponentials": usage.loop["MUFU"] * tile.num_warps * 32 / 16,
        "issue": usage.loop.total() * tile.num_warps / 4,
    }
    what = max(clocks, key=lambda name: clocks[name])
    return what, flop_a_channel * head_dim / clocks[what] * chip.multiprocessors * chip.clock_hz / 1e12


def table_row(configuration: Configuration, usage: Usage) -> str:
    tile = configuration.tile
    row = (
        f"{configuration!s:44} {tile.block_m:3} x {tile.block_n:3}, {tile.num_warps} warps, {tile.num_stages} stages: "
        f"{usage.registers:3} registers, {usage.shared_bytes / 1024:5.1f} KiB shared"
    )
    if limit := rate_limit(configuration, usage):
        a_score = usage.loop.total() * 32 * tile.num_warps / (tile.block_m * tile.block_n)
        row += f", {a_score:5.1f} instructions a score, {limit[1]:4.0f} TFLOP/s by {limit[0]}"
    return row


def _compile(configuration: Configuration) -> Any:
    architecture, pass_, dtype, head_dim, causal, masked = configuration
    tile = configuration.tile
    kernel = {
        "forward": forward._flash_fwd_kernel,
        "backward_delta": backward._flash_bwd_delta_kernel,
        "backward": backward._flash_bwd_kernel,
        "backward_gqa": backward._flash_bwd_kernel,
        "backward_dkdv": backward._flash_bwd_kernel,
        "backward_dq": backward._flash_bwd_dq_kernel,
    }[pass_]
    constants = {
        "D": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "SUMS_TILE": configuration._replace(name="backward").tile.block_m,
        "CAUSAL": causal,
        "HAS_MASK": masked,
        "GROUPED": pass_ != "backward",
        "ADD_DQ": pass_ != "backward_dkdv",
        "DQ_IN_TILES": configuration.adds_tiles,
        "SPLIT": configuration.splits_loop,
    }

    def type_of(argument: str) -> str:
        if argument == "dq_sum" and configuration.adds_tiles:
            return f"tensordesc<fp32[1, {tile.block_m}, {constants['BLOCK_D']}]>"
        return _type(argument, dtype)

    return compile_for(architecture, kernel, constants, type_of, lambda name: name == "padded_N", tile.options())


def _type(argument: str, dtype: str) -> str:
    if argument in ("q", "k", "v", "out", "d_out", "dq", "dk", "dv"):
        return f"*{dtype}"
    if argument in ("lse", "row_sums", "dq_sum"):
        return "*fp32"
    if argument == "key_mask":
        return "*u8"
    if argument == "key_tiles":
        return "*i32"
    return "fp32" if argument.startswith("scale") else "i32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", action="store_true", help="every dtype and pattern too, not one of each tile")
    parser.add_argument("--only", default="", help="a regular expression for the names in the first column")
    arguments = parser.parse_args()
    failures = 0
    for configuration in configurations(arguments.every):
        if re.search(arguments.only, str(configuration)):
            usage = measure(configuration)
            broken = limits_broken(configuration, usage)
            print(table_row(configuration, usage) + "".join(f"  [{reason}]" for reason in broken), flush=True)
            failures += bool(broken)
    raise SystemExit(f"{failures} configurations break a limit" if failures else 0)


if __name__ == "__main__":
    main()
