"""Throughput: time a step, samples a second, share of the device's peak."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from trunkline.engine.machine.hardware import memory_in_use
from trunkline.engine.ranks.distributed import Ranks


class Meter:
    """Throughput since the last reading, leaving out evaluations and saves.

    Args:
        ranks: this process among all.
        unit: what a batch's weight counts, in the plural.
        flops: useful floating-point operations of one sample, forward and backward; 0 if they are not counted.
        peak: the device's peak in FLOP/s, None if it is not known.
    """

    since: float
    """When the step that is being made began, on a clock that pauses."""

    def __init__(self, ranks: Ranks, unit: str, flops: float, peak: float | None) -> None:
        self.ranks, self.unit, self.flops, self.peak = ranks, unit, flops, peak
        self.restart()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is done within."""
        begin = time.perf_counter()
        yield
        self.since += time.perf_counter() - begin

    def add(self, samples: int, weight: float) -> float:
        """Count a step by the samples and the weight of its global batch. Returns the seconds that it took."""
        now = time.perf_counter()
        seconds = now - self.since
        self.since = now
        self.steps += 1
        self.samples += samples
        self.weight += weight
        self.seconds += seconds
        return seconds

    def read(self) -> dict[str, float]:
        """Seconds a step, samples and units a second over all ranks, memory in use, and the share of the device's peak
        where known. Nothing without a step since the last reading."""
        if not self.steps:
            return {}
        rate = self.samples / self.seconds
        values = {
            "step_time_s": self.seconds / self.steps,
            f"{self.unit}_per_s": self.weight / self.seconds,
            "samples_per_s": rate,
        }
        values |= memory_in_use(self.ranks.device)
        if self.peak and self.flops:
            values["mfu"] = rate * self.flops / (self.peak * self.ranks.world_size)
        self._count_anew()
        return values

    def restart(self) -> None:
        """Forget what was before: the next step begins now."""
        self.since = time.perf_counter()
        self._count_anew()

    def _count_anew(self) -> None:
        self.steps, self.samples, self.weight, self.seconds = 0, 0, 0.0, 0.0


def brief(values: dict[str, float], unit: str) -> str:
    """What stands beside the progress bar."""
    memory = values.get("gpu_memory_gib", values["host_memory_gib"])
    rate = values[f"{unit}_per_s"]
    return f"loss {values['loss']:.4g}, lr {values['lr']:.2e}, {rate:,.0f} {unit}/s, {memory:.2f} GiB"
