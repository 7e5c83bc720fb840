"""Rates of masked_mse and linear_masked_mse against the device's own copy, beside eager torch and torch.compile.

    run(arguments)   `python launchers/bench.py masked_mse`

A rate counts the bytes that have to move, as bytes_to_move says. It is shown only beside a right result of the same
call. The copy is of one large tensor, its bytes counted read and written.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from trunkline.benchmarks.report import (
    OK,
    OUT_OF_TIME,
    Deadline,
    Report,
    Row,
    as_accurate,
    device_name,
    first_line,
    median_seconds,
    the_device,
)
from trunkline.kernels.linear_masked_mse import linear_masked_mse
from trunkline.kernels.masked_mse import masked_mse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Call = Callable[..., tuple[Tensor, Tensor]]
D_TOKEN = 384
CONTENDERS = ("ours", "eager", "torch.compile")
FIGURES = ("gigabytes", "median_ms", "gb_per_s", "of_copy")  # of a row, where its result is right
CONSTANTS = {
    "TILE": (1024, 2048, 4096, 8192),
    "NUM_WARPS": (4, 8, 16),
    "PROGRAMS_PER_SM": (2, 4, 8, 16, 32),
    "STAGES": (2, 3, 4),
}
"""Constants that a kernel's module may have, and what --sweep tries for each, and for its BACKWARD_... namesake."""
AIM, STRETCH = 0.90, 0.95  # of the copy
AIMED_AT = {"masked_mse": 2**28, "linear_masked_mse": 2**22}
"""Values and rows from which on the aim holds: no cache holds them. Of fewer, what a call costs the host is much of its
time."""


def run(arguments: argparse.Namespace) -> int:
    """Check, time, print and write. Returns the exit status."""
    deadline, device = Deadline(arguments.minutes), the_device()
    gpu = device.type == "cuda"
    if arguments.sweep and not gpu:
        print("error: --sweep needs a GPU", file=sys.stderr)
        return 2
    # the fluid "large" head at micro-batch 8 first: 8 x 3 minutes x 6,174 states
    values = arguments.values or ([148_176, 2**26, 2**28, 2**30] if gpu else [148_176, 2**21])
    rows = arguments.rows or ([148_176, 2**20, 2**22] if gpu else [2**12, 2**14])
    if arguments.quick:
        values, rows = values[:2], rows[:2]
    budget_s = 0.05 if arguments.quick else 0.3
    copy = copy_bytes_per_second(device, budget_s)
    notes = [f"Copy of this device in this run: {copy / 1e12:.3g} TB/s. A rate counts the bytes that have to move."]
    if device_name(device) == "NVIDIA H200":
        notes.append(f"Aim: {AIM:.0%} of the copy, forward and backward; stretch: {STRETCH:.0%}.")
    if arguments.sweep:
        report = Report("sweep_masked_mse", "Tiles of masked_mse and linear_masked_mse", device, arguments.out)
        report.notes += notes
        return _sweep(report, copy, deadline)
    report = Report("masked_mse", "masked_mse and linear_masked_mse", device, arguments.out)
    report.notes += notes
    jobs = _jobs(report, [("masked_mse", n) for n in values] + [("linear_masked_mse", n) for n in rows])
    with torch._functorch.config.patch(donated_buffer=False):  # or a compiled backward pass can be timed only once
        report.measure(jobs, lambda job: _measure(job, device, copy, budget_s), deadline)
    return report.write(_draw)


class Job(NamedTuple):
    """One contender at one size, and the rows for what it will be found to do: forward and backward."""

    kernel: str
    size: int
    contender: str
    rows: list[Row]


def _jobs(report: Report, cases: list[tuple[str, int]]) -> list[Job]:
    """Every job, ours first at every size, what has to be compiled last; the rows in an order to read them in."""
    nothing_yet: Row = dict.fromkeys(FIGURES) | {"status": OUT_OF_TIME}
    jobs = []
    for (kernel, size), contender in itertools.product(cases, CONTENDERS):
        names = {"kernel": kernel, "values": size, "contender": contender}
        rows = [report.add(**names, direction=direction, **nothing_yet) for direction in ("forward", "backward")]
        jobs.append(Job(kernel, size, contender, rows))
    return sorted(jobs, key=lambda job: CONTENDERS.index(job.contender))


def copy_bytes_per_second(device: torch.device, budget_s: float) -> float:
    """Of a tensor far larger than any cache, bytes read plus bytes written."""
    source = torch.randn(2**29 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / median_seconds(lambda: target.copy_(source), device, budget_s)


def _measure(job: Job, device: torch.device, copy: float, budget_s: float) -> None:
    """Fill the job's rows."""
    try:
        ours, eager, inputs, mask = problem(job.kernel, job.size, device)
        call = ours if job.contender == "ours" else eager
        if job.contender == "torch.compile":
            torch.compiler.reset()
            call = torch.compile(eager, dynamic=False)
        status = as_accurate(_results(call, inputs, mask), _results(eager, inputs, mask), _truth(inputs, mask))
        figures = _figures(call, inputs, mask, device, copy, budget_s) if status == OK else {}
    except Exception as error:  # a compiler that is missing, say: the row names it
        status, figures = f"not run: {first_line(error)}", {}
    for row in job.rows:
        row |= {"status": status, **figures.get(row["direction"], {})}


def _figures(
    call: Call, inputs: list[Tensor], mask: Tensor, device: torch.device, copy: float, budget_s: float
) -> dict[str, Row]:
    """Of the forward pass, as in training, and of the backward pass."""
    leaves, (total, _) = _leaves(inputs), call(*inputs, mask)
    passes = {
        "forward": lambda: call(*inputs, mask),
        "backward": lambda: torch.autograd.grad(total, leaves, retain_graph=True),
    }
    figures = {}
    for direction, moved in bytes_to_move(inputs, mask).items():
        seconds = median_seconds(passes[direction], device, budget_s)
        rate = moved / seconds
        figures[direction] = dict(zip(FIGURES, (moved / 1e9, seconds * 1e3, rate / 1e9, rate / copy)))
    return figures


def bytes_to_move(inputs: list[Tensor], mask: Tensor) -> dict[str, int]:
    """What no kernel can do without, forward and backward; gradients are of predictions, or of all but the target.

    masked_mse reads all predictions, targets and the mask, backward too, and writes every gradient. A tenth of the
    values is masked, one here and one there: hardly 32 bytes in a row, the least that a GPU reads, are of no use.
    linear_masked_mse reads the rows of hidden that count, never the others: forward with the layer, targets and mask,
    backward with the weight and, in place of targets and mask, an fp32 error a row; it writes every gradient.
    """
    *linear, target = inputs
    gradients = _bytes(*_leaves(inputs))
    if len(linear) == 1:
        forward = _bytes(*inputs, mask)
        return {"forward": forward, "backward": forward + gradients}
    hidden, weight, bias = linear
    read = int(mask.sum()) * _bytes(hidden[0]) + _bytes(weight)
    return {"forward": read + _bytes(bias, target, mask), "backward": read + 4 * len(hidden) + gradients}


def _bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _leaves(inputs: list[Tensor]) -> list[Tensor]:
    return [x for x in inputs if x.requires_grad]


def problem(name: str, size: int, device: torch.device) -> tuple[Call, Call, list[Tensor], Tensor]:
    """(ours, eager, inputs, mask): bf16 predictions or hidden rows, fp32 targets, one value in ten masked."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    mask = torch.rand(size, device=device, generator=generator) > 0.1
    if name == "masked_mse":
        return masked_mse, _eager_masked_mse, [draw(size).bfloat16().requires_grad_(), draw(size)], mask
    linear = [draw(*shape).bfloat16().requires_grad_() for shape in ((size, D_TOKEN), (D_TOKEN,), (1,))]
    return linear_masked_mse, _eager_linear_masked_mse, [*linear, draw(size)], mask


def _eager_masked_mse(pred: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return (pred.float() - target).masked_fill(~mask, 0).square().sum(), mask.sum().float()


def _eager_linear_masked_mse(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    return _eager_masked_mse(F.linear(hidden, weight[None], bias).squeeze(-1), target, mask)


def _results(call: Call, inputs: list[Tensor], mask: Tensor) -> list[Tensor]:
    """sum, count and the gradients."""
    total, count = call(*inputs, mask)
    return [total.detach(), count, *torch.autograd.grad(total, _leaves(inputs))]


def _truth(inputs: list[Tensor], mask: Tensor) -> list[Tensor]:
    """What _results should be, in closed form and fp32, its sums in fp64 where they are long."""
    *linear, target = (x.detach().float() for x in inputs)
    pred = linear[0] if len(linear) == 1 else linear[0] @ linear[1] + linear[2]
    error = (pred - target).masked_fill(~mask, 0)
    sums = [error.double().square().sum().float(), mask.sum().float()]
    if len(linear) == 1:
        return [*sums, 2 * error]
    hidden, weight, _ = linear
    return [*sums, 2 * error[:, None] * weight, 2 * error @ hidden, 2 * error.double().sum().float()[None]]


def _sweep(report: Report, copy: float, deadline: Deadline) -> int:
    """Time choices of the kernels' constants, and write them by rate, the best first. Returns the exit status."""
    for kernel, size in AIMED_AT.items():
        shipped = _constants(kernel)
        choices = itertools.product(*(CONSTANTS[name] for name in shipped))
        for choice in dict.fromkeys([tuple(shipped.values()), *choices]):
            chosen = dict(zip(shipped, choice))
            columns = {name.lower(): chosen.get(name) for name in CONSTANTS}
            figures = {"forward": None, "backward": None, "status": OUT_OF_TIME}
            report.add(kernel=kernel, values=size, **columns, shipped=chosen == shipped, **figures)

    @lru_cache(maxsize=1)  # made when its first row has its turn, kept for the others
    def checked(kernel: str) -> tuple[Call, list[Tensor], Tensor, list[Tensor], list[Tensor]]:
        call, eager, inputs, mask = problem(kernel, AIMED_AT[kernel], report.device)
        return call, inputs, mask, _results(eager, inputs, mask), _truth(inputs, mask)

    def fill_in(row: Row) -> None:
        call, inputs, mask, plain, truth = checked(row["kernel"])
        module, chosen = vars(_module(row["kernel"])), {name: row[name.lower()] for name in _constants(row["kernel"])}
        if not row["shipped"]:
            chosen |= {f"BACKWARD_{name}": value for name, value in chosen.items() if f"BACKWARD_{name}" in module}
        shipped = {name: module[name] for name in chosen}
        try:
            module |= chosen
            status = as_accurate(_results(call, inputs, mask), plain, truth)
            figures = _figures(call, inputs, mask, report.device, copy, budget_s=0.05) if status == OK else {}
            row |= {"status": status, **{direction: figure["of_copy"] for direction, figure in figures.items()}}
        except Exception as error:  # too many registers, say
            row["status"] = f"not run: {first_line(error)}"
        finally:
            module |= shipped

    report.measure(report.rows, fill_in, deadline)
    report.rows.sort(key=lambda row: (row["kernel"], -min(row["forward"] or 0, row["backward"] or 0)))
    return report.write(_draw_sweep)


def _module(kernel: str) -> ModuleType:
    return importlib.import_module(f"trunkline.kernels.{kernel}")


def _constants(kernel: str) -> dict[str, int]:
    """Those that its module has, as they are now."""
    module = vars(_module(kernel))
    return {name: module[name] for name in CONSTANTS if name in module}


def _draw_sweep(rows: list[Row]) -> Figure:
    import matplotlib.pyplot as plt

    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    figure, axes = plt.subplots(1, len(kernels), figsize=(6 * len(kernels), 5), layout="constrained", squeeze=False)
    for axis, kernel in zip(axes[0], kernels, strict=True):
        for shipped, colour in ((False, "tab:blue"), (True, "tab:orange")):
            chosen = [row for row in rows if (row["kernel"], row["shipped"]) == (kernel, shipped)]
            axis.scatter([row["forward"] for row in chosen], [row["backward"] for row in chosen], color=colour)
        axis.set(title=f"{kernel}; shipped: orange", xlabel="forward, rate / copy", ylabel="backward, rate / copy")
    return figure


def _draw(rows: list[Row]) -> Figure:
    import matplotlib.pyplot as plt

    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    panels = list(itertools.product(kernels, ("forward", "backward")))
    figure, axes = plt.subplots(len(kernels), 2, figsize=(11, 3.5 * len(kernels)), layout="constrained", squeeze=False)
    for axis, (kernel, which) in zip(axes.flat, panels, strict=True):
        for contender in dict.fromkeys(row["contender"] for row in rows):
            points = [
                (row["values"], row["of_copy"])
                for row in rows
                if (row["kernel"], row["direction"], row["contender"]) == (kernel, which, contender)
            ]
            axis.plot(*zip(*points), marker="o", label=contender)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=f"{kernel}, {which}", xscale="log", xlabel="values", ylabel="rate / copy", ylim=(0, None))
    axes[0, 0].legend()
    return figure
