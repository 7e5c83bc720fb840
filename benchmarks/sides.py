"""Sides of a training benchmark that take turns: what is kept of them, their clock, the engine's side, and the report.

    Side, Clock            speeds and memory of one side; the part of a turn that counts
    Ours                   the engine's own loop over its own batches
    Apart                  a side in a process of its own
    write(...)             rows of pairs into <out>/<device>/<name>.json, for trunkline.benchmarks.summary

Steps before the clock begins do not count: one, and with loader processes as many as they may have read ahead.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from trunkline.benchmarks.pairs import ratio_of
from trunkline.benchmarks.report import OK, Report, matmul_flops, the_device
from trunkline.engine.machine.hardware import GIB
from trunkline.engine.task import Batch
from trunkline.engine.trainer import Trainer


@dataclass
class Side:
    """One of those that take turns: the units and the seconds of each turn, its losses, and peak bytes on a GPU.

    Units are real tokens, or images. `peak_bytes` is what it held beyond what all sides hold between turns: weights and
    optimizer states.
    """

    name: str
    units: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss_before: float = 0.0
    loss_after: float = 0.0
    peak_bytes: int = 0

    @property
    def speeds(self) -> list[float]:
        """Units a second of each turn."""
        return [units / seconds for units, seconds in zip(self.units, self.seconds, strict=True)]


class Clock:
    """Seconds and peak memory of the part of a turn that counts: of the wall on a GPU, else also of the process."""

    def __init__(self, side: Side, device: torch.device, cpu_time: bool) -> None:
        self.side, self.cuda = side, device.type == "cuda"
        self._now = time.process_time if cpu_time and not self.cuda else time.perf_counter

    def begin(self) -> None:
        """The last step that does not count is done."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._held = torch.cuda.memory_allocated()
        self._start = self._now()

    def end(self) -> None:
        """The last step is done."""
        if self.cuda:
            torch.cuda.synchronize()
            self.side.peak_bytes = max(self.side.peak_bytes, torch.cuda.max_memory_allocated() - self._held)
        self.side.seconds.append(self._now() - self._start)


class Ours:
    """The engine's own loop over its own batches; `count` gives the units of one."""

    def __init__(
        self, name: str, trainer: Trainer, steps: int, count: Callable[[Batch], int], warm_up: int = 1
    ) -> None:  # fmt: skip
        self.side, self.trainer = Side(name), trainer
        self._steps, self._warm_up, self._count = steps, warm_up, count
        self._clock = Clock(self.side, trainer.ranks.device, cpu_time=True)
        self._batches: Iterator[list[Batch]] = trainer._micro_batches()

    def take_turn(self) -> None:
        units = 0
        for step in range(self._warm_up + self._steps):
            if step == self._warm_up:
                units = 0
                self._clock.begin()
            batches = next(self._batches)
            units += sum(self._count(batch) for batch in batches)  # before they are on a GPU
            assert self.trainer.stepper.make(batches) is not None
        self._clock.end()
        self.side.units.append(units)


class Apart:
    """A side in a process of its own, as whoever uses it has it: its settings of the process are its own.

    `make` is called there, and can be pickled: it gives a context manager of the side. What is raised there is raised
    here. `wait` until it is ready for its first turn.
    """

    side: Side

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make))
        self._process.start()
        theirs.close()

    def wait(self) -> None:
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        self.side = answer

    def take_turn(self) -> None:
        self._pipe.send("turn")
        self.wait()

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


def _serve(pipe: Connection, make: Callable[[], AbstractContextManager[Any]]) -> None:
    try:
        with make() as each, contextlib.suppress(EOFError):
            while True:
                pipe.send(each.side)
                pipe.recv()
                each.take_turn()
    except Exception as error:  # for whoever asked for the turn
        pipe.send(error)


def apart(makers: Sequence[Callable[[], AbstractContextManager[Any]]], turns: int) -> list[Side]:
    """`take_turns` of sides in processes of their own."""
    with contextlib.ExitStack() as stack:
        sides = [stack.enter_context(contextlib.closing(Apart(make))) for make in makers]
        for each in sides:
            each.wait()
        return take_turns(sides, turns)


def take_turns(sides: Sequence[Any], turns: int) -> list[Side]:
    """`turns` of each, in alternating order. Returns what is kept of them."""
    for turn in range(turns):
        for each in sides[:: 1 if turn % 2 else -1]:
            each.take_turn()
    return [each.side for each in sides]


def write(
    arguments: argparse.Namespace, pairs: Sequence[tuple[Side, Side]], unit: str, about: str,
    flops_per_unit: float | None = None,
) -> None:  # fmt: skip
    """A row for each pair of ours and another, as <benchmark>-<backend>; nothing where --out is not given."""
    if arguments.out is None:
        return
    device = the_device()
    report = Report(f"{arguments.benchmark}-{arguments.backend}", arguments.benchmark, device, arguments.out)
    report.notes.append(about)
    matmul = matmul_flops(device) if flops_per_unit else None
    for ours, theirs in pairs:
        ratio, speed = ratio_of(ours.speeds, theirs.speeds), statistics.median(ours.speeds)
        flops = speed * flops_per_unit if flops_per_unit else None
        report.add(
            ours=ours.name, theirs=theirs.name, unit=unit, turns=len(ours.speeds), ours_per_s=speed,
            theirs_per_s=statistics.median(theirs.speeds), ratio=ratio.median, low=ratio.low, high=ratio.high,
            tflop_per_s=flops and flops / 1e12, of_matmul=flops and matmul and flops / matmul,
            ours_peak_gib=ours.peak_bytes / GIB or None, theirs_peak_gib=theirs.peak_bytes / GIB or None, status=OK,
        )  # fmt: skip
    print(f"written to {report.save()}")
