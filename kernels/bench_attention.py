"""Rates of flash_attention over fluid sequences, beside cuDNN, FlexAttention and plain SDPA.

    add_arguments(parser), run(arguments)   `python launchers/bench.py attention`

Sequences are T blocks of V variables; attention is block-causal with block V, and some variables are padding. A rate
counts useful FLOPs, 4 D forward and 10 D backward for every pair of a query and a key that it sees, so that rates of
different patterns compare; it is shown only beside a right result of the same call. cuDNN's kernel has no such pattern:
it runs as T unmasked slices, q of block t against the keys up to block t.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from kernels import flash_attention
from kernels.bench_report import (
    OK,
    Report,
    Row,
    add_common_arguments,
    as_accurate,
    device_name,
    first_line,
    integers,
    median_seconds,
    the_device,
)
from kernels.flash_attention_tiles import TILES, Tile
from kernels.reference import visible_pairs
from kernels.triton_path import triton

V = 6712
PADDING = 0.05  # of a block's variables, its last ones
MOST_DENSE_BYTES = 2**32  # of a mask tensor for plain SDPA
AIMS = {
    ("forward", 64): (450, 500),
    ("forward", 32): (330, 400),
    ("backward", 64): (400, 470),
    ("backward", 32): (300, 380),
}
"""(aim, stretch) on an H200 in TFLOP/s, block-causal with a key mask."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Problem(NamedTuple):
    """What a call takes. All of q, k and v need gradients."""

    leaves: list[Tensor]  # q, k, v [1, N, H, D]
    block: int | None  # None for full attention
    key_mask: Tensor | None  # [1, N]

    @property
    def q(self) -> Tensor:
        return self.leaves[0]

    @property
    def wide(self) -> Problem:
        """The same in fp32."""
        return self._replace(leaves=[x.detach().float().requires_grad_() for x in self.leaves])

    @property
    def pattern(self) -> str:
        return ("full" if self.block is None else "block-causal") + ("" if self.key_mask is None else " + key mask")

    @property
    def visible(self) -> int:
        """Pairs of a query and a key that it sees, over all heads."""
        _, N, H, _ = self.q.shape
        block = self.block or N
        real = torch.ones(1, N) if self.key_mask is None else self.key_mask
        seen = real.sum(0).cumsum(0)[[min(stop, N) - 1 for stop in range(block, N + block, block)]]
        rows = [min(block, N - start) for start in range(0, N, block)]
        return H * sum(int(count) * size for count, size in zip(seen, rows, strict=True))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `launchers/bench.py attention`."""
    add_common_arguments(parser)
    parser.add_argument("--head-dims", type=integers, metavar="D,...", help="head dimensions (default: 32,64,128)")
    parser.add_argument(
        "--blocks", type=integers, metavar="T,...", help=f"lengths, in blocks of {V:,} (default: 3,5,7,10)"
    )
    parser.add_argument("--heads", type=int, default=8, help="query and key heads (8)")
    parser.add_argument(
        "--sweep", choices=["forward", "backward", "backward_dq"], help="time tiles of a pass instead (GPU)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Check, time, print and write. Returns 1 if a result was wrong."""
    device = the_device()
    gpu = device.type == "cuda"
    head_dims = arguments.head_dims or ([32, 64, 128] if gpu else [32, 64])
    block = V if gpu else V // 40
    counts = arguments.blocks or ([3, 5, 7, 10] if gpu else [3, 6])
    if arguments.quick:
        head_dims, counts = head_dims[:2], [counts[0], counts[-1]] if gpu else counts[:1]
    budget_s = 0.05 if arguments.quick else 0.2
    if arguments.sweep:
        return _sweep(arguments.sweep, head_dims, block * counts[0], arguments.heads, device)
    report = Report("attention", "flash_attention over fluid sequences", device, arguments.out)
    report.notes.append(
        f"One sample, {arguments.heads} heads, blocks of {block:,} variables, {PADDING:.0%} of them padding; "
        "peak_mib is of forward and backward together, inputs and gradients included."
    )
    report.notes.append("Not run: FlashAttention 3 and the kernel of Triton's tutorial, which no dependency brings.")
    if not gpu:
        report.notes.append("Peak memory is measured on a GPU only.")
    for head_dim in head_dims:
        for count in tqdm(counts, desc=f"attention, D = {head_dim}", leave=False):
            for masked, blocked in ((True, True), (False, True), (False, False)):
                problem = make_problem(count * block, head_dim, arguments.heads, block, masked, blocked, device)
                ends = count in (counts[0], counts[-1])
                _measure(report, problem, budget_s, compile_flex=ends and masked)
        report.save(_draw)
    if device_name(device) == "NVIDIA H200":
        report.notes += _aims(report.rows)
    return report.write(_draw)


def make_problem(
    tokens: int, head_dim: int, heads: int, block: int, masked: bool, blocked: bool, device: torch.device
) -> Problem:
    """Random values, in bf16 on a GPU and fp32 on a CPU."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    leaves = [torch.randn(1, tokens, heads, head_dim, device=device, generator=generator) for _ in range(3)]
    leaves = [x.to(dtype).requires_grad_() for x in leaves]
    key_mask = (torch.arange(tokens, device=device) % block < round((1 - PADDING) * block))[None] if masked else None
    return Problem(leaves, block if blocked else None, key_mask)


def _measure(report: Report, problem: Problem, budget_s: float, compile_flex: bool) -> None:
    gpu = problem.q.is_cuda
    upstream = torch.randn_like(problem.q)
    truth = _results(_slices(problem.wide), problem.wide, upstream.float())
    plain = _results(_slices(problem), problem, upstream)
    for contender, build in contenders(problem, compile_flex).items():
        seconds: tuple[float, float] | None = None
        peak = None
        try:
            with _deterministic(contender == "ours, deterministic"):
                if gpu:
                    torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated() if gpu else 0
                attend = build()
                results = _results(attend, problem, upstream)
                if gpu:
                    own = sum(x.numel() * x.element_size() for x in (*problem.leaves, upstream))
                    peak = (torch.cuda.max_memory_allocated() - held + own) / 2**20
                status = as_accurate(results, plain, truth)
                if status == OK:
                    seconds = _seconds(attend, problem, upstream, budget_s)
        except Exception as error:  # not for this device, shape or memory: the row names it
            status = f"not run: {first_line(error)}"
        for index, (which, flops_a_pair) in enumerate((("forward", 4), ("backward", 10))):
            row: Row = {"head_dim": problem.q.shape[-1], "tokens": problem.q.shape[1], "pattern": problem.pattern}
            flops = flops_a_pair * problem.q.shape[-1] * problem.visible
            report.add(
                **row,
                contender=contender,
                direction=which,
                median_ms=seconds[index] * 1e3 if seconds else None,
                tflop_per_s=flops / seconds[index] / 1e12 if seconds else None,
                peak_mib=peak if status == OK else None,
                status=status,
            )


def contenders(problem: Problem, compile_flex: bool) -> dict[str, Callable[[], Attention]]:
    """Name -> what makes the call, or raises saying why it cannot be had. Ours comes first."""
    every: dict[str, Callable[[], Attention]] = {"ours": lambda: _ours(problem)}
    if problem.key_mask is not None:
        every["ours, deterministic"] = lambda: _ours(problem)
        every["FlexAttention, compiled"] = lambda: _flex(problem, compile_flex)
        every["plain SDPA with a mask"] = lambda: _dense(problem)
    else:
        every["cuDNN" if problem.block is None else "cuDNN, slices"] = lambda: _cudnn(problem)
    return every


def _ours(problem: Problem) -> Attention:
    return partial(flash_attention, causal_block=problem.block, key_mask=problem.key_mask)


def _slices(problem: Problem) -> Attention:
    """Torch's own fused attention, the queries of block t on the real keys up to block t."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        N = q.shape[1]
        block = problem.block or N
        parts = []
        for start in range(0, N, block):
            k_seen, v_seen = k[:, : start + block], v[:, : start + block]
            if problem.key_mask is not None:
                real = problem.key_mask[0, : start + block].nonzero()[:, 0]
                k_seen, v_seen = k_seen[:, real], v_seen[:, real]
            parts.append(_sdpa(q[:, start : start + block], k_seen, v_seen))
        return torch.cat(parts, dim=1)

    return attend


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def _cudnn(problem: Problem) -> Attention:
    if not problem.q.is_cuda:
        raise RuntimeError("needs a CUDA device")
    slices = _slices(problem)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return slices(q, k, v)

    return attend


def _flex(problem: Problem, wanted: bool) -> Attention:
    if not problem.q.is_cuda:
        raise RuntimeError("its backward pass needs a CUDA device")
    if not wanted:
        raise RuntimeError("compiled for the shortest and the longest sequence only")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    assert problem.key_mask is not None
    block, real, N = problem.block or problem.q.shape[1], problem.key_mask[0], problem.q.shape[1]

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j // block <= i // block) & real[j]

    block_mask = create_block_mask(sees, None, None, N, N, device=problem.q.device, _compile=True)
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=block_mask).transpose(1, 2)

    return attend


def _dense(problem: Problem) -> Attention:
    N = problem.q.shape[1]
    if N * N * problem.q.element_size() > MOST_DENSE_BYTES:
        raise RuntimeError(f"a mask of {N:,} x {N:,} is more than {MOST_DENSE_BYTES / 2**30:.0f} GiB")
    mask = visible_pairs(N, N, problem.block, problem.key_mask, problem.q.device)
    return partial(_sdpa, mask=mask)


def _results(attend: Attention, problem: Problem, upstream: Tensor) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    out = attend(*problem.leaves)
    return [out.detach(), *torch.autograd.grad(out, problem.leaves, upstream)]


def _seconds(attend: Attention, problem: Problem, upstream: Tensor, budget_s: float) -> tuple[float, float]:
    """Median times of the forward pass, as in training, and of the backward pass."""
    forward = median_seconds(lambda: attend(*problem.leaves), problem.q.device, budget_s)
    out = attend(*problem.leaves)
    again = lambda: torch.autograd.grad(out, problem.leaves, upstream, retain_graph=True)  # noqa: E731
    return forward, median_seconds(again, problem.q.device, budget_s)


@contextmanager
def _deterministic(on: bool) -> Iterator[None]:
    before, memory = torch.are_deterministic_algorithms_enabled(), cast(Any, torch.utils.deterministic)
    fill = memory.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(on)
        memory.fill_uninitialized_memory = False  # it would be timed
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = fill


def _aims(rows: list[Row]) -> list[str]:
    """What was reached at each length, beside the aims."""
    lines = [
        "| pass | head_dim | aim | stretch | reached, TFLOP/s | share of our full attention |",
        "|---|---|---|---|---|---|",
    ]
    for (which, head_dim), (aim, stretch) in AIMS.items():
        rates = {
            pattern: [
                row["tflop_per_s"]
                for row in rows
                if (row["direction"], row["head_dim"], row["pattern"], row["contender"], row["status"])
                == (which, head_dim, pattern, "ours", OK)
            ]
            for pattern in ("block-causal + key mask", "full")
        }
        reached, full = rates.values()
        shares = [f"{a / b:.0%}" for a, b in zip(reached, full)]
        numbers = (
            " to ".join(f"{rate:.0f}" for rate in sorted({min(reached), max(reached)})) if reached else "nothing right"
        )
        lines.append(f"| {which} | {head_dim} | {aim} | {stretch} | {numbers} | {', '.join(shares)} |")
    return ["\n".join(lines)]


def _sweep(name: str, head_dims: list[int], tokens: int, heads: int, device: torch.device) -> int:
    """Time tiles of one pass, right ones only, and print them by rate. Returns the exit status."""
    if device.type != "cuda":
        print("error: --sweep needs a GPU", file=sys.stderr)
        return 2
    architecture = 90 if torch.cuda.get_device_capability()[0] in (9, 10) else 80
    which = "forward" if name == "forward" else "backward"
    for head_dim in head_dims:
        problem = make_problem(tokens, head_dim, heads, V, True, True, device)
        upstream = torch.randn_like(problem.q)
        plain, flops = _results(_slices(problem), problem, upstream), (4 if which == "forward" else 10) * head_dim
        truth = _results(_slices(problem.wide), problem.wide, upstream.float())
        table, entry, figures = TILES[architecture, 16, name], triton.next_power_of_2(head_dim), []
        for tile in tqdm(_tiles(), desc=f"{name}, D = {head_dim}", leave=False):
            shipped = table[entry]
            try:
                table[entry] = tile
                with _deterministic(name == "backward_dq"):
                    status = as_accurate(_results(_ours(problem), problem, upstream), plain, truth)
                    seconds = _seconds(_ours(problem), problem, upstream, budget_s=0.05)[which == "backward"]
                figures.append((flops * problem.visible / seconds / 1e12 if status == OK else 0.0, tile, status))
            except Exception as error:  # too much shared memory, say
                figures.append((0.0, tile, first_line(error)))
            finally:
                table[entry] = shipped
        print(f"\n{name}, D = {head_dim}, {tokens:,} tokens; shipped: {table[entry]}")
        for rate, tile, status in sorted(figures, key=lambda figure: -figure[0])[:16]:
            print(f"  {rate:6.1f} TFLOP/s  {tuple(tile)}  {status}")
    return 0


def _tiles() -> list[Tile]:
    sizes, warps = ((64, 64), (64, 128), (128, 32), (128, 64), (128, 128)), ((4, 255), (8, 255), (8, 128))
    return [Tile(m, n, count, stages, most) for m, n in sizes for count, most in warps for stages in (2, 3)]


def _draw(rows: list[Row], device: str, path: Path) -> None:
    import matplotlib.pyplot as plt

    head_dims = sorted({row["head_dim"] for row in rows})
    figure, axes = plt.subplots(
        len(head_dims), 3, figsize=(15, 3.6 * len(head_dims)), layout="constrained", squeeze=False
    )
    for line, head_dim in zip(axes, head_dims, strict=True):
        for axis, key, which in zip(
            line, ("tflop_per_s", "tflop_per_s", "peak_mib"), ("forward", "backward", "backward")
        ):
            chosen = [row for row in rows if (row["head_dim"], row["direction"]) == (head_dim, which) and row[key]]
            for label in dict.fromkeys((row["contender"], row["pattern"]) for row in chosen):
                points = [(row["tokens"], row[key]) for row in chosen if (row["contender"], row["pattern"]) == label]
                axis.plot(*zip(*points), marker="o", label=", ".join(label))
            title = f"D = {head_dim}, " + (f"{which}, TFLOP/s" if key == "tflop_per_s" else "peak of both passes, MiB")
            axis.set(title=title, xlabel="tokens", ylim=(0, None))
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(device)
    figure.savefig(path, dpi=120)
    plt.close(figure)
