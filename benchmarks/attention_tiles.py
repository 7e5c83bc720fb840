"""Rates of flash_attention by tile: what kernels/attention/tiles.py should ship on this device.

sweep(...)   `python launchers/bench.py attention --sweep forward`, or another of PASSES; needs a GPU

Only the plain kernels are timed, also where a Hopper kernel would serve: that one has one tile.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trunkline.benchmarks.contenders import (
    Problem,
    V,
    deterministic,
    make_problem,
    ours,
    references,
    results,
    upstream_of,
)
from trunkline.benchmarks.report import OK, OUT_OF_TIME, Deadline, Report, Row, as_accurate, first_line, median_seconds
from trunkline.kernels.attention.tiles import HOPPER_BACKWARD, HOPPER_FORWARD, TILES, Tile, architecture_of
from trunkline.kernels.triton_path import triton

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Checks = tuple[list[Tensor], list[Tensor]]


def sweep(
    name: str, head_dims: list[int], tokens: int, heads: int, device: torch.device, out: Path, deadline: Deadline
) -> int:
    """Time tiles of one pass, right ones only, and write them by rate, the best first. Returns the exit status."""
    if device.type != "cuda":
        print("error: --sweep needs a GPU", file=sys.stderr)
        return 2
    report = Report(f"sweep_{name}", f"Tiles of flash_attention's {name} pass", device, out)
    report.notes.append(f"One sample of {tokens:,} tokens, {heads} heads, block-causal with a key mask.")
    return _sweep(report, name, TILES[architecture_of(device), 16, name], head_dims, tokens, heads, deadline)


def _sweep(
    report: Report,
    name: str,
    table: dict[int, Tile],
    head_dims: list[int],
    tokens: int,
    heads: int,
    deadline: Deadline,
) -> int:
    for head_dim in head_dims:
        shipped = table[triton.next_power_of_2(head_dim)]
        figures: Row = {"tflop_per_s": None, "status": OUT_OF_TIME}
        for tile in dict.fromkeys([shipped, *tiles()]):
            report.add(head_dim=head_dim, **tile._asdict(), shipped=tile == shipped, **figures)

    @lru_cache(maxsize=1)  # made when its first row has its turn, kept for the others
    def checked(head_dim: int) -> tuple[Problem, Checks]:
        problem = make_problem(tokens, head_dim, heads, V, True, True, report.device)
        return problem, references(problem, upstream_of(problem))

    report.measure(report.rows, lambda row: _fill_in(row, name, table, *checked(row["head_dim"])), deadline)
    report.rows.sort(key=lambda row: (row["head_dim"], -(row["tflop_per_s"] or 0)))
    return report.write(_draw)


def _fill_in(row: Row, name: str, table: dict[int, Tile], problem: Problem, checks: Checks) -> None:
    """The row's tile, put into the table for as long as it takes; the kernel with tiles of its own does not serve."""
    entry = triton.next_power_of_2(problem.q.shape[-1])
    shipped, flops = table[entry], 4 * problem.q.shape[-1] * problem.visible
    attend, upstream = ours(problem), upstream_of(problem)
    hopper = HOPPER_FORWARD if name == "forward" else HOPPER_BACKWARD
    its_tile = hopper.pop(problem.q.shape[-1], None)
    try:
        table[entry] = Tile(*(row[field] for field in Tile._fields))
        with deterministic(name not in ("forward", "backward")):
            status = as_accurate(results(attend, problem, upstream), *checks)
            call = lambda: attend(*problem.leaves)  # noqa: E731
            if name != "forward":
                out, flops = call(), flops * 10 // 4
                call = lambda: torch.autograd.grad(out, problem.leaves, upstream, retain_graph=True)[0]  # noqa: E731
            rate = flops / median_seconds(call, problem.q.device, budget_s=0.05) / 1e12 if status == OK else None
            row |= {"status": status, "tflop_per_s": rate}
    except Exception as error:  # too much shared memory, say
        row["status"] = f"not run: {first_line(error)}"
    finally:
        table[entry] = shipped
        if its_tile:
            hopper[problem.q.shape[-1]] = its_tile


def tiles() -> list[Tile]:
    """Those that a Hopper multiprocessor may run well: with registers capped, two or three programs of them at once."""
    sizes = ((64, 64), (64, 128), (128, 32), (128, 64), (128, 128))
    warps = ((4, 255), (4, 168), (8, 255), (8, 128))
    return [Tile(m, n, count, stages, most) for m, n in sizes for count, most in warps for stages in (2, 3)]


def _draw(rows: list[Row]) -> Figure:
    import matplotlib.pyplot as plt

    head_dims = sorted({row["head_dim"] for row in rows})
    figure, axes = plt.subplots(1, len(head_dims), figsize=(6 * len(head_dims), 6), layout="constrained", squeeze=False)
    for axis, head_dim in zip(axes[0], head_dims, strict=True):
        best = [row for row in rows if row["head_dim"] == head_dim][:16][::-1]
        names = [", ".join(str(row[field]) for field in Tile._fields) for row in best]
        colours = ["tab:orange" if row["shipped"] else "tab:blue" for row in best]
        axis.barh(names, [row["tflop_per_s"] for row in best], color=colours)
        axis.set(title=f"D = {head_dim}; shipped: orange", xlabel="TFLOP/s")
    figure.supylabel(", ".join(Tile._fields))
    return figure
