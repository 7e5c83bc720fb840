"""compile_for, resources: a Triton kernel compiled for a GPU that need not be there, and what its code needs.

Triton compiles for any architecture, and brings the assembler and the disassembler that tell.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kernels.triton_path import triton


def compile_for(
    architecture: int,
    kernel: Any,
    constants: dict[str, Any],
    type_of: Callable[[str], str],
    is_aligned: Callable[[str], bool],
    options: dict[str, int],
) -> Any:
    """Triton's compiled `kernel` for sm_<architecture>.

    `constants` may name more than the kernel takes; `type_of` gives the type of each other argument, as Triton spells
    it. Pointers, and the integers that `is_aligned` names, are multiples of 16, as Triton would see at a launch.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else type_of(name) for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name][0] == "*" or is_aligned(name)]
    source = ASTSource(
        kernel,
        signature,
        {(i,): constants[name] for i, name in enumerate(names) if name in constants},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(compiled: Any) -> dict[str, int]:
    """What a compiled kernel needs: REG registers a thread, STACK and LOCAL bytes of it spilled to memory."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        report = run_tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin))
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}


def run_tool(*command: str) -> str:
    """What a command prints, errors included. Raises CalledProcessError."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout
