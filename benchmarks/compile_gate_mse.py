"""What the kernels of squared errors and of key tiles need, compiled without a GPU.

    python -m trunkline.benchmarks.compile_gate_mse

They live by memory, so two things fail the gate: registers spilled to memory, and values that are not loaded 16 bytes
at a time. (Where rows have an odd length they cannot be; the rows below are of 8 x something values, as V = 6,712.)
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from trunkline.benchmarks.offline_compiler import compile_for, resources, wide_loads
from trunkline.kernels import column_sums as _column_sums
from trunkline.kernels import linear_masked_mse as _linear
from trunkline.kernels import masked_mse as _masked
from trunkline.kernels.attention import key_tiles as _key_tiles

_IN_INPUT_DTYPE = {"pred", "grad_pred", "hidden", "weight", "bias", "grad_hidden"}
_IN_FP32 = {"target", "grad_target", "grad_sum", "error", "partials", "out"}


class Configuration(NamedTuple):
    architecture: int  # 90 for sm_90
    name: str
    dtype: str  # as Triton spells it
    kernel: Any
    constants: dict[str, int]
    num_warps: int
    wide_loads: int  # 16-byte loads that it must have at least, of the values

    def __str__(self) -> str:
        return f"sm_{self.architecture} {self.name} {self.dtype}"


class Usage(NamedTuple):
    registers: int
    spilled_bytes: int
    wide_loads: int


def configurations(architectures: tuple[int, ...] = (90, 80)) -> Iterator[Configuration]:
    """What the launch functions ask for, at V = 6,712 and 384 hidden channels."""
    for architecture in architectures:
        for dtype in ("bf16", "fp32"):
            for name, layout in {
                "no mask": {"R": 1, "inner": 1, "STRIDE2": 0, "HAS_MASK": 0, "FLAT": 1, "ALIGN": 16},
                "mask": {"R": 1, "inner": 1, "STRIDE2": 1, "HAS_MASK": 1, "FLAT": 1, "ALIGN": 16},
                "mask [V]": {"STRIDE2": 1, "HAS_MASK": 1, "FLAT": 0, "ALIGN": 8},
                "mask [B, T, 1]": {"STRIDE2": 0, "HAS_MASK": 1, "FLAT": 0, "ALIGN": 8},
            }.items():
                block = {"BLOCK_R": 1, "BLOCK_C": _masked.TILE}
                loads = _masked.TILE // (32 * _masked.NUM_WARPS) * ((2 if dtype == "bf16" else 4) + 4) // 16
                needs = {"NEED_PRED": 1, "NEED_TARGET": 1}
                for kernel, more in ((_masked._masked_mse_fwd_kernel, {}), (_masked._masked_mse_bwd_kernel, needs)):
                    title = f"masked_mse {'backward' if more else 'forward'}, {name}"
                    yield Configuration(
                        architecture, title, dtype, kernel, layout | block | more, _masked.NUM_WARPS, loads
                    )
            launches = {
                "forward": (_linear.TILE, _linear.NUM_WARPS, _linear.STAGES),
                "backward": (_linear.BACKWARD_TILE, _linear.BACKWARD_NUM_WARPS, _linear.BACKWARD_STAGES),
            }
            kernels = {
                "forward": _linear._linear_masked_mse_fwd_kernel,
                "backward": _linear._linear_masked_mse_bwd_kernel,
            }
            parts = {"forward": 384 // _linear.BLOCK_D, "backward": 1}  # those of a row that a program has
            constants = {
                "forward": {"HAS_MASK": 1, "PARTS": parts["forward"], "MAX_UNROLLED": _linear.MAX_PARTS},
                "backward": {"NEED_HIDDEN": 1, "NEED_LINEAR": 1, "NEED_TARGET": 1},
            }
            for name, (tile, num_warps, stages) in launches.items():
                kernel = kernels[name]
                block = {"BLOCK_N": tile // _linear.BLOCK_D, "BLOCK_D": _linear.BLOCK_D, "STAGES": stages}
                # once before the loop for each tile that is fetched ahead, and once in it
                loads = stages * parts[name] * tile // (32 * num_warps) * (2 if dtype == "bf16" else 4) // 16
                title = f"linear_masked_mse {name}"
                yield Configuration(architecture, title, dtype, kernel, block | constants[name], num_warps, loads)
        for keys in (16, 32, 64, 128):
            block = {"BLOCK_N": keys, "BLOCK_T": _key_tiles.TILES_AT_ONCE}
            title = f"sort_key_tiles, {keys} keys a tile"
            yield Configuration(architecture, title, "u8", _key_tiles._sort_key_tiles_kernel, block, 8, 0)
        sums = {"BLOCK_P": 64, "BLOCK_N": 32}
        yield Configuration(architecture, "column_sums", "fp32", _column_sums._column_sums_kernel, sums, 8, 0)


def measure(configuration: Configuration) -> Usage:
    """Compile one configuration and read what it needs off the code."""
    compiled = _compile(configuration)
    usage = resources(compiled)
    return Usage(usage["REG"], max(usage["STACK"], usage["LOCAL"]), wide_loads(compiled.asm["ptx"]))


def limits_broken(configuration: Configuration, usage: Usage) -> list[str]:
    """What fails the gate, in words."""
    broken = [f"spills {usage.spilled_bytes} bytes"] if usage.spilled_bytes else []
    if usage.wide_loads < configuration.wide_loads:
        broken.append(f"{usage.wide_loads} loads of 16 bytes, not {configuration.wide_loads}")
    return broken


def _compile(configuration: Configuration) -> Any:
    # as at the launches of the sizes above: 384 channels, strides of 0
    return compile_for(
        configuration.architecture,
        configuration.kernel,
        configuration.constants,
        partial(_type, dtype=configuration.dtype),
        lambda name: name in ("d", "stride", "stride0", "stride1"),
        {"num_warps": configuration.num_warps},
    )


def _type(argument: str, dtype: str) -> str:
    if dtype == "u8":
        return {"mask": "*u8", "out": "*i32"}.get(argument, "i32")
    if argument in _IN_INPUT_DTYPE:
        return f"*{dtype}"
    if argument in _IN_FP32:
        return "*fp32"
    return "*i1" if argument == "mask" else "i32"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", type=int, nargs="+", default=[90, 80], choices=[90, 80])
    parser.add_argument("--only", default="", help="a regular expression for the names in the first column")
    arguments = parser.parse_args()
    failures = 0
    for configuration in configurations(tuple(arguments.architectures)):
        if not re.search(arguments.only, str(configuration)):
            continue
        usage = measure(configuration)
        broken = limits_broken(configuration, usage)
        row = f"{configuration!s:56} {usage.registers:3} registers, {usage.wide_loads:2} loads of 16 bytes"
        print(row + "".join(f"  [{reason}]" for reason in broken), flush=True)
        failures += bool(broken)
    raise SystemExit(f"{failures} configurations break a limit" if failures else 0)


if __name__ == "__main__":
    main()
