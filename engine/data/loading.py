"""From the order of samples to batches: which samples a rank reads, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from trunkline.engine.config.deepspeed_section import BatchSizes
from trunkline.engine.data.order import FILLER, GlobalBatches
from trunkline.engine.data.randomness import mix_last
from trunkline.engine.machine.workers import WORKERS
from trunkline.engine.task import Batch, Samples, Task

Draws = list[np.ndarray]
"""Two: the samples of a micro-batch, int64 [B] with FILLER where there is none, and the keys of their draws."""


def training_loader(
    task: Task, dataset: Samples, batches: GlobalBatches, sizes: BatchSizes, rank: int, *,
    first_step: int, last_step: int, num_workers: int, pin_memory: bool,
) -> Iterator[list[Batch]]:  # fmt: skip
    """For each step of range(first_step, last_step): this rank's micro-batches, `grad_accum_steps` of them."""

    def draws() -> Iterator[Draws]:
        for step in range(first_step, last_step):
            drawn = batches.draws(step).reshape(2, sizes.grad_accum_steps, sizes.world_size, sizes.micro_batch_size)
            yield from ([drawn[0, micro, rank], drawn[1, micro, rank]] for micro in range(sizes.grad_accum_steps))

    steps = range(first_step, last_step)
    loader = iter(_loader(task, dataset, draws, len(steps) * sizes.grad_accum_steps, num_workers, pin_memory))
    for _ in steps:
        yield [next(loader) for _ in range(sizes.grad_accum_steps)]


def evaluation_loader(
    task: Task, dataset: Samples, *, num_samples: int | None, micro_batch_size: int, world_size: int, rank: int,
    num_workers: int = 0, pin_memory: bool = False,
) -> DataLoader[Batch] | _InThisProcess:  # fmt: skip
    """Every chosen sample once over all ranks, the same number of batches on each, filled up where short.

    `num_samples` evenly spaced samples are chosen; all of them if None.
    """
    size = len(dataset)
    count = size if num_samples is None else min(num_samples, size)
    chosen = np.arange(count) * size // max(count, 1)
    steps = -(-count // (micro_batch_size * world_size))
    places = np.full(steps * micro_batch_size * world_size, FILLER, dtype=np.int64)
    places[:count] = chosen
    mine = places.reshape(steps, world_size, micro_batch_size)[:, rank]

    def draws() -> Iterator[Draws]:
        yield from ([batch, mix_last(batch)] for batch in mine)

    return _loader(task, dataset, draws, steps, num_workers, pin_memory)


def _loader(
    task: Task, dataset: Samples, draws: Callable[[], Iterator[Draws]], count: int, num_workers: int,
    pin_memory: bool,
) -> DataLoader[Batch] | _InThisProcess:  # fmt: skip
    """`count` batches, made by `num_workers` processes ahead of time, or here when they are asked for."""
    keyed, sampler, collate_fn = _Keyed(dataset), _Sampler(draws, count), _Collate(task)
    if num_workers == 0:
        return _InThisProcess(keyed, sampler, collate_fn, pin_memory)
    return DataLoader(
        keyed,
        batch_sampler=sampler,
        collate_fn=collate_fn,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=False,
        multiprocessing_context=WORKERS,
        # the order of samples needs no generator; without this a loader would advance torch's global one
        generator=torch.Generator(),
    )


@dataclass(frozen=True)
class _Sampler:
    """What torch takes for a sampler of batches: any iterable of what `_Keyed` understands."""

    draws: Callable[[], Iterator[Draws]]
    count: int

    def __iter__(self) -> Iterator[Draws]:
        return self.draws()

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class _InThisProcess:
    """A DataLoader without workers, which costs some 80 microseconds a batch less."""

    dataset: _Keyed
    sampler: _Sampler
    collate_fn: _Collate
    pin_memory: bool

    def __iter__(self) -> Iterator[Batch]:
        for draws in self.sampler:
            batch = self.collate_fn(self.dataset.__getitems__(draws))
            yield {key: value.pin_memory() for key, value in batch.items()} if self.pin_memory else batch

    def __len__(self) -> int:
        return len(self.sampler)


class _Keyed(Dataset[Any]):
    def __init__(self, dataset: Samples) -> None:
        self.dataset = dataset

    def __getitems__(self, draws: Draws) -> list[Any]:
        return [[self.dataset[index] for index in draws[0].clip(0).tolist()], draws]


class _Collate:
    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, items: list[Any]) -> Batch:
        return collate(self.task, *items)


def collate(task: Task, samples: Sequence[Any], draws: Draws) -> Batch:
    """The batch of these samples, with what the engine adds to it."""
    batch = task.collate(samples)
    batch["valid"] = torch.from_numpy(draws[0] != FILLER)
    batch["draw"] = torch.from_numpy(draws[1])
    return batch
