"""Rates of flash_attention over fluid sequences, beside cuDNN, FlexAttention and plain SDPA.

    run(arguments)   `python launchers/bench.py attention`

A rate counts useful FLOPs, 4 D forward and 10 D backward for every pair of a query and a key that it sees, so rates
of different patterns compare; it is shown only beside a right result of the same call. What matters most comes first,
and what was measured is on disk: time on a GPU may end at any moment.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch._functorch.config
from torch import Tensor

from trunkline.benchmarks import attention_borders
from trunkline.benchmarks import attention_tiles as bench_attention_tiles
from trunkline.benchmarks.contenders import (
    CONTENDERS,
    PADDING,
    PATTERNS,
    Problem,
    V,
    deterministic,
    make_problem,
    references,
    results,
    upstream_of,
)
from trunkline.benchmarks.report import (
    OK,
    OUT_OF_TIME,
    Deadline,
    Report,
    Row,
    as_accurate,
    first_line,
    median_seconds,
    the_device,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AIMS = {
    ("forward", 64): (450, 500),
    ("forward", 32): (330, 400),
    ("backward", 64): (400, 470),
    ("backward", 32): (300, 380),
}
"""(aim, stretch) on an H200 in TFLOP/s, block-causal with a key mask."""
SHARE_AIMS = {"forward": (0.95, 0.98), "backward": (0.90, 0.95)}
"""(aim, stretch) of the same over the rate of full attention."""
FLOPS_A_PAIR = {"forward": 4, "backward": 10}  # and head dimension

References = dict[tuple[int, int, str], tuple[list[Tensor], list[Tensor]]]


class Job(NamedTuple):
    """One contender on one problem, and the rows for what it will be found to do: forward and backward."""

    contender: str
    pattern: str
    head_dim: int
    tokens: int
    at_an_end: bool  # of the lengths
    rows: list[Row]

    def priority(self) -> tuple[int, ...]:
        """Ours, then its deterministic mode, then the others; of each first the head dimensions and lengths of AIMS."""
        aimed_at = [head_dim for _, head_dim in AIMS]
        in_aims = self.head_dim in aimed_at
        rank = list(CONTENDERS).index(self.contender)
        return (
            min(rank, 2),
            not (in_aims and self.at_an_end),
            rank,
            list(PATTERNS).index(self.pattern),
            aimed_at.index(self.head_dim) if in_aims else len(aimed_at),
            self.tokens,
        )


def run(arguments: argparse.Namespace) -> int:
    """Check, time, print and write. Returns the exit status."""
    deadline, device = Deadline(arguments.minutes), the_device()
    gpu = device.type == "cuda"
    head_dims = arguments.head_dims or ([32, 64, 128] if gpu else [32, 64])
    block = V if gpu else V // 40
    counts = arguments.blocks or ([3, 5, 7, 10] if gpu else [3, 6])
    if arguments.quick:
        head_dims, counts = head_dims[:2], [counts[0], counts[-1]] if gpu else counts[:1]
    budget_s = 0.05 if arguments.quick else 0.2
    if arguments.sweep:
        return bench_attention_tiles.sweep(
            arguments.sweep, head_dims, counts[0] * V, arguments.heads, device, arguments.out, deadline
        )
    if arguments.borders:
        return attention_borders.borders(head_dims, device, arguments.out, deadline)
    report = Report("attention", "flash_attention over fluid sequences", device, arguments.out)
    report.notes.append(
        f"One sample, {arguments.heads} heads, blocks of {block:,} variables, {PADDING:.0%} of them padding; "
        "peak_mib is of forward and backward together, inputs and gradients included."
    )
    report.notes.append("Not run: FlashAttention 3 and the kernel of Triton's tutorial, which no dependency brings.")
    if not gpu:
        report.notes.append("Peak memory is measured on a GPU only.")
    kept: References = {}
    jobs = sorted(_jobs(report, head_dims, counts, block), key=Job.priority)
    with torch._functorch.config.patch(donated_buffer=False):  # or a compiled backward pass can be timed only once
        report.measure(jobs, lambda job: _measure(job, arguments.heads, block, device, budget_s, kept), deadline)
    return report.write(_draw)


def _jobs(report: Report, head_dims: list[int], counts: list[int], block: int) -> list[Job]:
    """Every job, its rows in the report in an order to read them in."""
    return [
        Job(
            contender,
            pattern,
            head_dim,
            count * block,
            count in (min(counts), max(counts)),
            [
                report.add(
                    head_dim=head_dim,
                    tokens=count * block,
                    pattern=pattern,
                    contender=contender,
                    direction=direction,
                    median_ms=None,
                    tflop_per_s=None,
                    peak_mib=None,
                    status=OUT_OF_TIME,
                )
                for direction in FLOPS_A_PAIR
            ],
        )
        for head_dim in head_dims
        for count in counts
        for pattern, contenders in PATTERNS.items()
        for contender in contenders
    ]


def _measure(job: Job, heads: int, block: int, device: torch.device, budget_s: float, kept: References) -> None:
    """Fill the job's rows, the forward pass's also where the backward pass fails."""
    forward, backward = job.rows
    try:
        masked, blocked = "key mask" in job.pattern, job.pattern != "full"
        problem = make_problem(job.tokens, job.head_dim, heads, block, masked, blocked, device)
        leaves, upstream, useful = problem.leaves, upstream_of(problem), job.head_dim * problem.visible
        plain, truth = _references(job, problem, upstream, kept)
        with deterministic(job.contender == "ours, deterministic"):
            held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            attend = CONTENDERS[job.contender](problem)
            status = as_accurate([attend(*leaves).detach()], plain[:1], truth[:1])
            right = status == OK
            rate = _rate(lambda: attend(*leaves), FLOPS_A_PAIR["forward"] * useful, device, budget_s) if right else {}
            forward |= {"status": status, **rate}
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            gradients = results(attend, problem, upstream)[1:]
            peak_mib = _peak_mib(held, problem, upstream)
            status = as_accurate(gradients, plain[1:], truth[1:])
            out = attend(*leaves)
            again = lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)  # noqa: E731
            rate = _rate(again, FLOPS_A_PAIR["backward"] * useful, device, budget_s) if status == OK else {}
            backward |= {"status": status, **rate}
        for row in job.rows:
            row["peak_mib"] = peak_mib if row["status"] == OK else None
    except Exception as error:  # not for this device, shape or memory: the row names it
        for row in job.rows:
            if row["tflop_per_s"] is None and not row["status"].startswith("wrong"):
                row["status"] = f"not run: {first_line(error)}"


def _rate(call: Callable[[], object], flops: int, device: torch.device, budget_s: float) -> Row:
    seconds = median_seconds(call, device, budget_s)
    return {"median_ms": seconds * 1e3, "tflop_per_s": flops / seconds / 1e12}


def _peak_mib(held: int, problem: Problem, upstream: Tensor) -> float | None:
    """What a call took at most beyond `held` bytes, with what it was given; None on a CPU."""
    if not problem.q.is_cuda:
        return None
    own = sum(x.numel() * x.element_size() for x in (*problem.leaves, upstream))
    return (torch.cuda.max_memory_allocated() - held + own) / 2**20


def _references(job: Job, problem: Problem, upstream: Tensor, kept: References) -> tuple[list[Tensor], list[Tensor]]:
    """What results are checked against.

    Kept where memory allows, since the priorities put the contenders on one problem far apart, and in fp32 it takes
    longer than most of what it checks.
    """
    key = (job.head_dim, job.tokens, job.pattern)
    if key in kept:
        return kept[key]
    plain, truth = references(problem, upstream)
    if not problem.q.is_cuda or 2 * torch.cuda.mem_get_info()[0] > torch.cuda.mem_get_info()[1]:
        kept[key] = plain, truth
    return plain, truth


def _draw(rows: list[Row]) -> Figure:
    import matplotlib.pyplot as plt

    head_dims = sorted({row["head_dim"] for row in rows})
    figure, axes = plt.subplots(
        len(head_dims), 3, figsize=(15, 3.6 * len(head_dims)), layout="constrained", squeeze=False
    )
    labels = list(dict.fromkeys((row["contender"], row["pattern"]) for row in rows))
    lines = {}
    for line, head_dim in zip(axes, head_dims, strict=True):
        for axis, key, which in zip(
            line, ("tflop_per_s", "tflop_per_s", "peak_mib"), ("forward", "backward", "backward")
        ):
            chosen = [row for row in rows if (row["head_dim"], row["direction"]) == (head_dim, which) and row[key]]
            for number, label in enumerate(labels):  # one colour everywhere
                points = [(row["tokens"], row[key]) for row in chosen if (row["contender"], row["pattern"]) == label]
                if points:
                    (lines[label],) = axis.plot(*zip(*points), marker="o", color=f"C{number}")
            title = f"D = {head_dim}, " + (f"{which}, TFLOP/s" if key == "tflop_per_s" else "peak of both passes, MiB")
            axis.set(title=title, xlabel="tokens", ylim=(0, None))
    shown = [label for label in labels if label in lines]
    figure.legend([lines[label] for label in shown], [", ".join(label) for label in shown], loc="outside lower center",
                  ncols=3, fontsize=8)  # fmt: skip
    return figure
