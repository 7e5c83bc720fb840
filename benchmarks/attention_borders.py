"""Where one attention kernel takes over from another: both timed on either side of each border.

borders(...)   `python launchers/bench.py attention --borders`; needs a GPU, and for FEWEST_... a Hopper one

A border stands right where the kernel that it chooses is the faster one, or nearly so, in every row.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch

from trunkline.benchmarks.contenders import make_problem, ours, references, results, upstream_of
from trunkline.benchmarks.report import OK, OUT_OF_TIME, Deadline, Report, Row, as_accurate, first_line, median_seconds
from trunkline.kernels.attention import flash, hopper
from trunkline.kernels.attention.tiles import HOPPER_FORWARD

TORCH = ("ROWS_PER_CHANNEL", "PRODUCTS")
BORDERS = {
    **dict.fromkeys(TORCH, (flash, "torch", "Triton")),
    "FEWEST_ROWS": (hopper, "Triton", "Hopper"),
    "FEWEST_TILES": (hopper, "Triton", "Hopper"),
}
"""Name -> its module, the kernel below it and the one above it."""
SHARES = (0.5, 0.9, 1.1, 2.0)  # of a border's value
_TILE, _NEVER = 192, 2**40  # rows of a Hopper kernel's tile; more than any problem has


def borders(head_dims: list[int], device: torch.device, out: Path, deadline: Deadline) -> int:
    """Time both kernels around each border, right results only, and write them. Returns the exit status."""
    if device.type != "cuda":
        print("error: --borders needs a GPU", file=sys.stderr)
        return 2
    names = list(BORDERS) if torch.cuda.get_device_capability(device)[0] == 9 else list(TORCH)
    report = Report("borders", "flash_attention on either side of its borders", device, out)
    report.rows += rows(names, head_dims)
    report.measure(report.rows, lambda row: fill_in(row, device), deadline)
    return report.write()


def rows(names: list[str], head_dims: list[int]) -> list[Row]:
    """Problems around each border, clear of the others; nothing of them is measured yet."""
    found: list[Row] = []
    for name, D, share in itertools.product(names, head_dims, SHARES):
        if D > flash.WIDEST or (name not in TORCH and D not in HOPPER_FORWARD):
            continue
        module, below, above = BORDERS[name]
        value = round(share * getattr(module, name))
        tokens, heads = _size(name, value, D)
        found.append(
            {"border": name, "share": share, "head_dim": D, "tokens": tokens, "heads": heads}
            | {"chosen": below if share < 1 else above, "faster": None, "below_ms": None, "above_ms": None}
            | {"status": OUT_OF_TIME}
        )
    return found


def _size(name: str, value: int, D: int) -> tuple[int, int]:
    """Tokens and heads of a problem that has this value of `name`, and is above the borders of other names."""
    if name == "ROWS_PER_CHANNEL":
        return value * D, -(-2 * flash.PRODUCTS // (value**2 * D**3))
    if name == "PRODUCTS":
        tokens = 3 * flash.ROWS_PER_CHANNEL * D
        return tokens, max(1, round(value / (tokens**2 * D)))
    if name == "FEWEST_ROWS":
        return value, -(-4 * hopper.FEWEST_TILES * _TILE // value)
    return 20 * _TILE, -(-value // 20)


def fill_in(row: Row, device: torch.device) -> None:
    """Both passes of both kernels: the border is put first above the problem, then below it."""
    (module, *kernels), tokens = BORDERS[row["border"]], row["tokens"]
    problem = make_problem(tokens, row["head_dim"], row["heads"], tokens, row["border"] not in TORCH, False, device)
    attend, upstream, shipped = ours(problem), upstream_of(problem), getattr(module, row["border"])
    try:
        checks, ms = references(problem, upstream), []
        for value in (_NEVER, 0):
            setattr(module, row["border"], value)
            if (status := as_accurate(results(attend, problem, upstream), *checks)) != OK:
                row["status"] = status
                return
            ms.append(1e3 * median_seconds(lambda: results(attend, problem, upstream), device, budget_s=0.1))
        row |= {"below_ms": ms[0], "above_ms": ms[1], "faster": kernels[ms[1] < ms[0]], "status": OK}
    except Exception as error:  # too little memory, say
        row["status"] = f"not run: {first_line(error)}"
    finally:
        setattr(module, row["border"], shipped)
