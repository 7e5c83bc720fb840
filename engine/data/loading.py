"""From the order of samples to batches: which samples a rank reads, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from trunkline.engine.config.deepspeed_section import BatchSizes
from trunkline.engine.data.order import FILLER, GlobalBatches
from trunkline.engine.data.randomness import mix_last
from trunkline.engine.errors import TrunklineError
from trunkline.engine.machine.workers import WORKERS
from trunkline.engine.task import Batch, Samples, Task

Draws = list[np.ndarray]
"""Two: the samples of a micro-batch, int64 [B] with FILLER where there is none, and the keys of their draws."""


@dataclass(frozen=True)
class Batches(Dataset[Batch]):
    """A rank's batches by their places: `batches[place]` is the same whoever makes it, and whenever."""

    task: Task
    dataset: Samples
    draws: Callable[[int], Draws | None]
    """The draws of a place. Where there are none, the batch is empty: it holds nothing on any rank."""
    count: int
    pin_memory: bool = False

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> Batch:
        draws = self.draws(place)
        if draws is None:
            return {}
        batch = collate(self.task, _read(self.dataset, draws[0].clip(0).tolist()), draws)
        return {key: value.pin_memory() for key, value in batch.items()} if self.pin_memory else batch

    def __iter__(self) -> Iterator[Batch]:
        return map(self.__getitem__, range(self.count))


def training_loader(
    task: Task, dataset: Samples, batches: GlobalBatches, sizes: BatchSizes, rank: int, *,
    first_step: int, last_step: int, num_workers: int, pin_memory: bool,
) -> Iterator[list[Batch]]:  # fmt: skip
    """For each step of range(first_step, last_step): this rank's micro-batches, equally many on all ranks.

    There are `grad_accum_steps` of them; fewer where a short batch leaves some without a sample on any rank.
    """
    accumulation = sizes.grad_accum_steps

    @lru_cache(maxsize=1)
    def of_step(step: int) -> np.ndarray:
        return batches.draws(step).reshape(2, accumulation, sizes.world_size, sizes.micro_batch_size)[:, :, rank]

    def draws(place: int) -> Draws | None:
        step, micro = first_step + place // accumulation, place % accumulation
        if micro * sizes.world_size * sizes.micro_batch_size >= batches.count(step):
            return None
        drawn = of_step(step)
        return [drawn[0, micro], drawn[1, micro]]

    steps = range(first_step, last_step)
    loader = iter(_loader(Batches(task, dataset, draws, len(steps) * accumulation), num_workers, pin_memory))
    for _ in steps:
        yield [batch for batch in islice(loader, accumulation) if batch]


def evaluation_loader(
    task: Task, dataset: Samples, *, num_samples: int | None, micro_batch_size: int, world_size: int, rank: int,
    num_workers: int = 0, pin_memory: bool = False,
) -> _FromWorkers | Batches:  # fmt: skip
    """Every chosen sample once over all ranks, the same number of batches on each, filled up where short.

    `num_samples` evenly spaced samples are chosen; all of them if None.
    """
    size = len(dataset)
    count = size if num_samples is None else min(num_samples, size)
    micro_batch_size = min(micro_batch_size, max(count, 1))
    chosen = np.arange(count) * size // max(count, 1)
    steps = -(-count // (micro_batch_size * world_size))
    places = np.full(steps * micro_batch_size * world_size, FILLER, dtype=np.int64)
    places[:count] = chosen
    mine = places.reshape(steps, world_size, micro_batch_size)[:, rank]

    def draws(step: int) -> Draws:
        return [mine[step], mix_last(mine[step])]

    return _loader(Batches(task, dataset, draws, steps), num_workers, pin_memory)


class _FromWorkers:
    """Batches in order, made by `num_workers` processes ahead of time.

    An error that a user can cause comes out as it was raised; a DataLoader would put the worker's traceback into it.
    """

    def __init__(self, batches: Batches, num_workers: int, pin_memory: bool) -> None:
        self._loader: DataLoader[Batch | TrunklineError] = DataLoader(
            _OrError(batches),
            batch_size=None,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=False,
            multiprocessing_context=WORKERS,
            # the order of samples needs no generator; without this a loader would advance torch's global one
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if isinstance(batch, TrunklineError):
                raise batch
            yield batch


@dataclass(frozen=True)
class _OrError(Dataset["Batch | TrunklineError"]):
    batches: Batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, place: int) -> Batch | TrunklineError:
        try:
            return self.batches[place]
        except TrunklineError as error:
            return error


def _loader(batches: Batches, num_workers: int, pin_memory: bool) -> _FromWorkers | Batches:
    """The batches in order, made by `num_workers` processes ahead of time, or here when they are asked for.

    A DataLoader without workers would cost some 80 microseconds a batch more.
    """
    if num_workers == 0:
        return replace(batches, pin_memory=pin_memory)
    return _FromWorkers(batches, num_workers, pin_memory)


def _read(dataset: Samples, indices: list[int]) -> list[Any]:
    together = getattr(dataset, "__getitems__", None)
    return [dataset[index] for index in indices] if together is None else together(indices)


def collate(task: Task, samples: Sequence[Any], draws: Draws) -> Batch:
    """The batch of these samples, with what the engine adds to it."""
    batch = task.collate(samples)
    batch["valid"] = torch.from_numpy(draws[0] != FILLER)
    batch["draw"] = torch.from_numpy(draws[1])
    return batch
