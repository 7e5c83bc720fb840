"""What flash_attention's backward pass for sm_90 needs in shared memory and registers, as compile_gate says of others.

    python -m trunkline.benchmarks.compile_gate_backward_hopper [--only REGEX]

No GPU is needed. What would make a tile slow or unusable fails it: more shared memory than there is, products that the
assembler had to put one after the other, or more than MOST_SPILLS transfers of spilled registers in a loop of some 450
instructions, as many as cost nothing that was noticed.
"""

from __future__ import annotations

import argparse
import itertools
import re
import tempfile
from typing import Any

import torch

from trunkline.benchmarks.compile_gate import PATTERNS, SHARED_MEMORY_LIMIT
from trunkline.benchmarks.offline_compiler import compile_for, product_loops, run_tool
from trunkline.kernels.attention.backward_hopper import BLOCK_M, _flash_bwd_hopper_kernel, shared_layout
from trunkline.kernels.attention.tiles import HOPPER_BACKWARD, ConsumerTile

MOST_SPILLS = 16
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # as Triton spells them


def compiled_kernel(tile: ConsumerTile, head_dim: int, dtype: str, causal: bool, masked: bool) -> Any:
    rows, row_of = BLOCK_M.value, [1, BLOCK_M.value]
    blocks = {name: (dtype, [1, 1, rows, head_dim]) for name in ("q", "d_out")}
    blocks |= dict.fromkeys(("row_lse", "row_delta"), ("fp32", row_of))
    blocks |= {"dq_sum": ("fp32", [1, rows, head_dim])}

    def type_of(argument: str) -> str:
        if argument in blocks:
            of, block = blocks[argument]
            return f"tensordesc<{of}{block},{shared_layout(block, DTYPES[of])!r}>"
        if argument in ("k", "v", "dk", "dv"):
            return f"*{dtype}"
        if argument == "key_mask":
            return "*u8"
        return "fp32" if argument.startswith("scale") else "i32"

    constants = {**tile.constants(), "CAUSAL": causal, "HAS_MASK": masked}
    return compile_for(90, _flash_bwd_hopper_kernel, constants, type_of, lambda _: False, tile.options(), gluon=True)


def limits_broken(tile: ConsumerTile, compiled: Any) -> list[str]:
    from triton.backends.nvidia.compiler import get_ptxas

    broken = []
    if compiled.metadata.shared > SHARED_MEMORY_LIMIT[90]:
        broken.append(f"needs {compiled.metadata.shared} bytes of shared memory")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(compiled.asm["ptx"])
        file.flush()
        remarks = run_tool(get_ptxas(90).path, "-arch=sm_90a", file.name, "-o", "/dev/null")
    if "wgmma.mma_async instructions are serialized" in remarks:
        broken.append("wgmma serialized")
    if "'setmaxnreg' ignored" in remarks:
        broken.append("registers not handed over")
    # the consumers' own loops; around them is one that hands out the work
    loops = sorted(product_loops(compiled), key=len)[: tile.consumers]
    spills = max(sum(name.startswith(("LDL", "STL")) for name in loop) for loop in loops)
    if spills > MOST_SPILLS:
        broken.append(f"{spills} transfers of spilled registers in a loop")
    return broken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a regular expression for the names in the first column")
    arguments = parser.parse_args()
    failures = 0
    for (head_dim, tile), dtype, pattern in itertools.product(HOPPER_BACKWARD.items(), ("bf16", "fp16"), PATTERNS):
        name = f"{dtype} D={head_dim} " + ("causal" if pattern[0] else "full") + ("+mask" if pattern[1] else "")
        if re.search(arguments.only, name):
            compiled = compiled_kernel(tile, head_dim, dtype, *pattern)
            broken = limits_broken(tile, compiled)
            row = f"{name:24} {tile.consumers} consumers: {compiled.metadata.shared / 1024:5.1f} KiB shared"
            print(row + "".join(f"  [{reason}]" for reason in broken), flush=True)
            failures += bool(broken)
    raise SystemExit(f"{failures} configurations break a limit" if failures else 0)


if __name__ == "__main__":
    main()
