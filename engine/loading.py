"""From the order of samples to batches: which samples a rank reads at each step, and how they become tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from engine.deepspeed_section import BatchSizes
from engine.order import FILLER, GlobalBatches
from engine.randomness import mix_last
from engine.task import Batch, Task

Draw = tuple[int, int]
"""(index of the sample or FILLER, key of this draw of it)."""


def training_loader(
    task: Task, dataset: Dataset[Any], batches: GlobalBatches, sizes: BatchSizes, rank: int, *,
    first_step: int, last_step: int, num_workers: int, pin_memory: bool,
) -> Iterator[list[Batch]]:  # fmt: skip
    """For each step of range(first_step, last_step): this rank's micro-batches, `grad_accum_steps` of them."""

    def draws() -> Iterator[list[Draw]]:
        for step in range(first_step, last_step):
            samples, epoch = batches.samples(step), batches.epoch(step)
            for micro in samples.reshape(sizes.grad_accum_steps, sizes.world_size, sizes.micro_batch_size)[:, rank]:
                yield list(zip(micro.tolist(), mix_last(micro, batches.seed, epoch).tolist(), strict=True))

    loader = iter(_loader(task, dataset, draws, num_workers, pin_memory))
    for _ in range(first_step, last_step):
        yield [next(loader) for _ in range(sizes.grad_accum_steps)]


def evaluation_loader(
    task: Task, dataset: Dataset[Any], *, num_samples: int | None, micro_batch_size: int, world_size: int, rank: int,
    num_workers: int = 0, pin_memory: bool = False,
) -> DataLoader[Batch]:  # fmt: skip
    """Every chosen sample once over all ranks, the same number of batches on each, filled up where short.

    `num_samples` evenly spaced samples are chosen; all of them if None.
    """
    size = len(dataset)  # type: ignore[arg-type]
    count = size if num_samples is None else min(num_samples, size)
    chosen = np.arange(count) * size // max(count, 1)
    steps = -(-count // (micro_batch_size * world_size))
    places = np.full(steps * micro_batch_size * world_size, FILLER, dtype=np.int64)
    places[:count] = chosen
    mine = places.reshape(steps, world_size, micro_batch_size)[:, rank]

    def draws() -> Iterator[list[Draw]]:
        yield from (list(zip(batch.tolist(), mix_last(batch).tolist(), strict=True)) for batch in mine)

    return _loader(task, dataset, draws, num_workers, pin_memory)


def _loader(task: Task, dataset: Dataset[Any], draws: Any, num_workers: int, pin_memory: bool) -> DataLoader[Batch]:
    return DataLoader(
        _Keyed(dataset),
        batch_sampler=_Draws(draws),
        collate_fn=_Collate(task),
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=False,
        # the order of samples needs no generator; without this a loader would advance torch's global one
        generator=torch.Generator(),
    )


class _Draws:
    def __init__(self, draws: Any) -> None:
        self.draws = draws

    def __iter__(self) -> Iterator[list[Draw]]:
        return iter(self.draws())


class _Keyed(Dataset[Any]):
    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitems__(self, draws: list[Draw]) -> list[tuple[Any, bool, int]]:
        return [(self.dataset[max(index, 0)], index != FILLER, key) for index, key in draws]


class _Collate:
    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, items: list[tuple[Any, bool, int]]) -> Batch:
        return collate(self.task, items)


def collate(task: Task, items: Sequence[tuple[Any, bool, int]]) -> Batch:
    """The batch of these samples, each with whether it counts and the key of its draw."""
    samples, valid, keys = zip(*items, strict=True)
    batch = task.collate(samples)
    batch["valid"] = torch.tensor(valid, dtype=torch.bool)
    batch["draw"] = torch.tensor(keys, dtype=torch.int64)
    return batch
