"""What every shipped tile of flash_attention needs in registers and shared memory.

    python -m trunkline.benchmarks.compile_gate

Compiles the kernels for each architecture of SHARED_MEMORY_LIMIT with Triton and the assembler that it brings: no GPU
is needed. What would make a tile slow or unusable fails it:

- registers spilled to memory. STACK bytes a thread may wait there while the inner loop hardly asks for them; in
  "backward_hopper" a consumer's loop of some 450 instructions may move MOST_SPILLS of them: docs/measured.md has the
  rate of bf16 with them;
- more registers or shared memory than a multiprocessor lends to one program (CUDA C++ Programming Guide, "Compute
  capabilities");
- rows that are not loaded 16 bytes at a time. "forward_hopper" and "backward_hopper" load by TMA, and are not asked;
- in 16-bit tiles, mask arithmetic in the loop that is to do without, or in every turn of the one that may branch around
  it;
- on sm_90, 16-bit products that are no warp-group instructions, or that the assembler put one after the other for want
  of registers;
- registers that the loading warps of a Gluon kernel do not hand over; in "forward_hopper", exponentials that wait for
  products.

The table also counts what the inner loop, the one without mask arithmetic where there are two, asks of each
multiprocessor for a tile of scores, and says what is asked the most: tensor cores, exponentials (16 a clock) or issued
instructions (4 a clock). Were nothing else in the way, an H200 or A100 would run at the rate that follows. No kernel
does; but of two tiles it tells which one leaves less to wait for.
"""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from trunkline.benchmarks.offline_compiler import (
    compile_for,
    gate,
    product_loops,
    resources,
    run_tool,
    shortest_way,
    wide_loads,
)
from trunkline.kernels.attention import backward, forward
from trunkline.kernels.attention.tiles import ARCHITECTURES, HOPPER_BACKWARD, HOPPER_FORWARD, TILES, Tile
from trunkline.kernels.triton_path import triton

REGISTERS = 65_536  # of a multiprocessor
STACK = 96  # bytes a thread that may wait there, as long as the inner loop hardly asks for them
MOST_SPILLS = 16  # instructions of a "backward_hopper" loop that move spilled registers
HOPPER = {"forward_hopper": HOPPER_FORWARD, "backward_hopper": HOPPER_BACKWARD}  # passes of sm_90 alone, in Gluon
SHARED_MEMORY_LIMIT = {
    architecture: kib * 1024 for architecture, kib in {90: 227, 80: 163, 86: 99, 89: 99, 100: 227, 120: 99}.items()
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # as Triton spells them


class Configuration(NamedTuple):
    architecture: int  # 90 for sm_90
    name: str  # of PASSES or HOPPER
    dtype: str  # as Triton spells it
    head_dim: int
    causal: bool
    masked: bool

    @property
    def tile(self) -> Tile:
        if self.name in HOPPER:
            return HOPPER[self.name][self.head_dim]
        bits = 32 if self.dtype == "fp32" else 16
        name = "backward" if self.name in ("backward_gqa", "backward_dkdv") else self.name
        return TILES[ARCHITECTURES[self.architecture], bits, name][triton.next_power_of_2(self.head_dim)]

    @property
    def warps_that_load(self) -> int:
        return 4 if self.name in HOPPER else 0  # beside those of the tile

    @property
    def splits_loop(self) -> bool:
        """Whether the tiles that need no mask have a loop of their own."""
        if self.name in ("backward", "backward_gqa", "backward_dkdv"):
            return backward.split_loop(triton.next_power_of_2(self.head_dim), self.name == "backward_dkdv")
        return self.name not in ("backward_delta", "backward_hopper")

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
    exponentials_beside_products: bool = False  # all of the loop's, while the tensor cores work for the same warps
    spills_in_loops: int = 0  # transfers of spilled registers in one of the consumers' loops, at most
    registers_handed_over: bool = True  # by the warps that load, where there are some


class Chip(NamedTuple):
    flop_per_clock: int  # of a multiprocessor's tensor cores, bf16
    multiprocessors: int
    clock_hz: float


CHIPS = {90: Chip(4096, 132, 1.83e9), 80: Chip(2048, 108, 1.41e9)}
PRODUCTS = {
    "forward": 2,
    "forward_hopper": 2,
    "backward": 5,
    "backward_gqa": 5,
    "backward_hopper": 5,
}  # of tiles; 2 head_dim operations a score each

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
        for name, tiles in HOPPER.items():
            for head_dim, dtype, pattern in itertools.product(tiles, ("bf16", "fp16"), PATTERNS):
                yield Configuration(90, name, dtype, head_dim, *pattern)
        return
    for name, tiles in HOPPER.items():
        for head_dim in tiles:
            yield Configuration(90, name, "bf16", head_dim, causal=True, masked=True)
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
    loops = product_loops(compiled)
    inner = shortest_way(loops[0]) if loops else []
    # one loop for each warpgroup that multiplies; around them is one that hands out the work
    own = loops[: configuration.tile.num_warps // 4] if configuration.name in HOPPER else []
    return Usage(
        usage["REG"],
        usage["STACK"],
        usage["LOCAL"],
        compiled.metadata.shared,
        wgmma,
        serialized,
        wide_loads(ptx),
        Counter(name.split(".")[0] for name in inner),
        exponentials_beside_products(inner),
        max((sum(x.name.startswith(("LDL", "STL")) for x in loop) for loop in own), default=0),
        "'setmaxnreg' ignored" not in remarks,
    )


def exponentials_beside_products(loop: list[str]) -> bool:
    """Whether they all stand between a wait that is for some of the products and the one that is for the rest."""
    waits = [i for i, name in enumerate(loop) if name.startswith("WARPGROUP.DEPBAR")]
    products = [i for i, name in enumerate(loop) if name.startswith("HGMMA")]
    exponentials = [i for i, name in enumerate(loop) if name.startswith("MUFU.EX2")]
    return (
        len(waits) == 2 and all(waits[0] < i < waits[1] for i in exponentials) and max(products, default=-1) < waits[0]
    )


def limits_broken(configuration: Configuration, usage: Usage) -> list[str]:
    broken = []
    seldom = 100 * (usage.loop["LDL"] + usage.loop["STL"]) < usage.loop.total()
    if configuration.name == "backward_hopper":
        if usage.spills_in_loops > MOST_SPILLS:
            broken.append(f"{usage.spills_in_loops} transfers of spilled registers in a loop")
    elif usage.local_bytes or usage.stack_bytes > (STACK if seldom else 0):
        broken.append(f"spills {max(usage.stack_bytes, usage.local_bytes)} bytes")
    if usage.registers * 32 * (configuration.tile.num_warps + configuration.warps_that_load) > REGISTERS:
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
    if not usage.registers_handed_over:
        broken.append("registers not handed over")
    if configuration.name == "forward_hopper" and not usage.exponentials_beside_products:
        broken.append("exponentials wait for products")
    if multiplies_tiles and not usage.loop:
        broken.append("no inner loop found")
    if (configuration.splits_loop or configuration.name == "backward_dkdv") and usage.loop["FSEL"]:
        broken.append("mask arithmetic in the inner loop")
    return broken


def least_wide_loads(configuration: Configuration) -> int:
    """Those of a thread that bring in each of the tiles once; of one that is too small for its threads, none."""
    if configuration.name in HOPPER:
        return 0  # TMA does it
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
    if pass_ in HOPPER:
        return _compile_hopper(configuration)
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


def _compile_hopper(configuration: Configuration) -> Any:
    from trunkline.kernels.attention import backward_hopper, forward_hopper
    from trunkline.kernels.attention.hopper_memory import LOADING_WARPS, shared_layout

    tile, head_dim, dtype = configuration.tile, configuration.head_dim, configuration.dtype
    if configuration.name == "forward_hopper":
        kernel = forward_hopper._flash_fwd_hopper_kernel
        rows = {"q": forward_hopper.CONSUMER_ROWS.value, "k": tile.block_n, "v": tile.block_n}
        blocks = {name: (dtype, [1, 1, count, head_dim]) for name, count in rows.items()}
    else:
        kernel = backward_hopper._flash_bwd_hopper_kernel
        blocks = dict.fromkeys(("q", "d_out"), (dtype, [1, 1, tile.block_m, head_dim]))
        blocks |= dict.fromkeys(("row_lse", "row_delta"), ("fp32", [1, tile.block_m]))
        blocks["dq_sum"] = ("fp32", [1, tile.block_m, head_dim])

    def type_of(argument: str) -> str:
        if argument not in blocks:
            return _type(argument, dtype)
        of, block = blocks[argument]
        return f"tensordesc<{of}{block},{shared_layout(block, DTYPES[of])!r}>"

    constants = {"STAGES": tile.num_stages, "CAUSAL": configuration.causal, "HAS_MASK": configuration.masked}
    options = {"num_warps": LOADING_WARPS, "maxnreg": tile.max_registers, "enable_fp_fusion": True}
    return compile_for(90, kernel, constants, type_of, lambda _: False, options, gluon=True)


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
    gate(__doc__, "not one of each tile", configurations, looked_at)


def looked_at(configuration: Configuration) -> tuple[str, list[str]]:
    """Its line of the table, and what fails the gate."""
    usage = measure(configuration)
    return table_row(configuration, usage), limits_broken(configuration, usage)


if __name__ == "__main__":
    main()
