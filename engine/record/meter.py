"""Throughput: time a step, samples a second, share of the device's peak."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from trunkline.engine.config.deepspeed_section import BatchSizes
from trunkline.engine.machine.hardware import memory_in_use


class Meter:
    """Throughput since the last reading, leaving out evaluations and saves.

    Args:
        sizes: of the batches, with the number of ranks.
        device: this rank's.
        step: the number of steps made so far.
        unit: what a batch's weight counts, in the plural.
        flops: useful floating-point operations of one sample, forward and backward; 0 if they are not counted.
        peak: the device's peak in FLOP/s, None if it is not known.
    """

    def __init__(
        self, sizes: BatchSizes, device: torch.device, step: int, unit: str, flops: float, peak: float | None
    ) -> None:
        self.sizes, self.device, self.unit, self.flops, self.peak = sizes, device, unit, flops, peak
        self.weight = torch.zeros((), device=device)
        self.restart(step)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is done within."""
        begin = time.perf_counter()
        yield
        self.since += time.perf_counter() - begin

    def add(self, weight: Tensor) -> None:
        """Count the weight of a step's global batch, a scalar on the device."""
        self.weight = self.weight + weight

    def read(self, step: int) -> dict[str, float]:
        """Seconds a step, samples and units a second over all ranks, memory in use, and the share of the device's peak
        where known."""
        weight = float(self.weight)
        elapsed = time.perf_counter() - self.since
        seconds = elapsed / max(1, step - self.step)
        self.restart(step)
        rate = self.sizes.global_batch_size / seconds
        values = {"step_time_s": seconds, "samples_per_s": rate, f"{self.unit}_per_s": weight / elapsed}
        values |= memory_in_use(self.device)
        if self.peak and self.flops:
            values["mfu"] = rate * self.flops / (self.peak * self.sizes.world_size)
        return values

    def restart(self, step: int) -> None:
        """Forget what was before: `step` steps are made, and the next begins now."""
        self.since, self.step = time.perf_counter(), step
        self.weight = torch.zeros((), device=self.device)


def brief(values: dict[str, float], unit: str) -> str:
    """What stands beside the progress bar."""
    memory = values.get("gpu_memory_gib", values["host_memory_gib"])
    rate = values[f"{unit}_per_s"]
    return f"loss {values['loss']:.4g}, lr {values['lr']:.2e}, {rate:,.0f} {unit}/s, {memory:.2f} GiB"
