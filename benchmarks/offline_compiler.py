"""A Triton kernel compiled for a GPU that need not be there, and the command that looks at many.

Triton compiles for any architecture, and brings the assembler and the disassembler that tell.
"""

from __future__ import annotations

import argparse
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from trunkline.kernels.triton_path import triton

C = TypeVar("C")


def compile_for(
    architecture: int,
    kernel: Any,
    constants: dict[str, Any],
    type_of: Callable[[str], str],
    is_aligned: Callable[[str], bool],
    options: dict[str, int],
    gluon: bool = False,
) -> Any:
    """Triton's compiled `kernel` for sm_<architecture>.

    `constants` may name more than the kernel takes; `type_of` gives the type of each other argument, as Triton spells
    it. Pointers, and the integers that `is_aligned` names, are multiples of 16, as Triton would see at a launch.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source_type: Any = ASTSource
    if gluon:
        from triton.experimental.gluon._runtime import GluonASTSource

        source_type = GluonASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else type_of(name) for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name][0] == "*" or is_aligned(name)]
    source = source_type(
        kernel,
        signature,
        {(i,): constants[name] for i, name in enumerate(names) if name in constants},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def resources(compiled: Any) -> dict[str, int]:
    """What a compiled kernel needs: REG registers a thread, STACK and LOCAL bytes of it spilled to memory."""
    report = _disassembled(compiled.asm["cubin"])
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}


class Instruction(NamedTuple):
    address: int
    name: str  # of the machine instruction, "MUFU.EX2" for one
    target: int | None  # where a branch leads


def product_loops(compiled: Any) -> list[list[Instruction]]:
    """A compiled kernel's loops that multiply tiles on tensor cores, the shortest first."""
    pattern = r"/\*([0-9a-f]{4,})\*/ +(?:@!?U?P\w+ +)?([A-Z][\w.]*)(.*?);"
    code, loops = [], []
    for address, name, operands in re.findall(pattern, _disassembled(compiled.asm["cubin"])):
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        code.append(Instruction(int(address, 16), name, int(target[1], 16) if target else None))
    for end, _, start in code:
        if start is not None and start < end:
            body = [x for x in code if start <= x.address <= end]
            # one that leads further back is no loop but a wait, kept apart, and all between it and its place
            leads_back = any(x.target is not None and x.target < start for x in body)
            if not leads_back and any(x.name.startswith(("HGMMA", "HMMA", "UTCHMMA")) for x in body):
                loops.append(body)
    return sorted(loops, key=len)


def shortest_way(loop: list[Instruction]) -> list[str]:
    """The names of a loop's instructions without those that a branch can skip, as the mask of a tile without one."""
    names, resume_at = [], 0
    for address, name, target in loop:
        if address >= resume_at:
            names.append(name)
            if target is not None and address < target <= loop[-1].address:
                resume_at = target
    return names


def wide_loads(ptx: str) -> int:
    """How many instructions load 16 bytes from memory."""
    forms = r"ld\.global[\w.:]*\.v4\.b32|ld\.global[\w.:]*\.v2\.b64|cp\.async\.cg\.shared\.global [^;]*, 0x10,"
    return len(re.findall(forms, ptx))


@functools.lru_cache(maxsize=1)  # the tool takes a quarter of a second, whatever it is asked
def _disassembled(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        return run_tool(triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(path))


def run_tool(*command: str) -> str:
    """What a command prints, errors included. Raises CalledProcessError."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True).stdout


def gate(
    description: str, not_every: str, configurations: Callable[[bool], Iterable[C]],
    looked_at: Callable[[C], tuple[str, list[str]]],
) -> None:  # fmt: skip
    """Print a line for each configuration, and what is broken there. Ends the process with 1 if anything is.

    configurations: all of them, or those that stand for all; looked_at: a line, and what is broken
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--every", action="store_true", help=f"every dtype and pattern too, {not_every}")
    parser.add_argument("--only", default="", help="a regular expression for the names in the first column")
    arguments = parser.parse_args()
    failures = 0
    for configuration in configurations(arguments.every):
        if re.search(arguments.only, str(configuration)):
            line, broken = looked_at(configuration)
            print(line + "".join(f"  [{reason}]" for reason in broken), flush=True)
            failures += bool(broken)
    raise SystemExit(f"{failures} configurations break a limit" if failures else 0)
