"""Evaluation: exact metrics over the whole validation set, whatever the number of ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from trunkline.engine.backends import Backend
from trunkline.engine.data.loading import evaluation_loader
from trunkline.engine.errors import ConfigError
from trunkline.engine.ranks.distributed import Ranks, sum_over_ranks
from trunkline.engine.task import Batch, Sums, Task, add_sums

SHOWN = "shown"
"""The folder of a run for what the task shows of the last evaluation: pictures, texts, tables."""


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`, copied asynchronously where it was pinned."""
    if device.type == "cpu":
        return batch
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def evaluated(task: Task, backend: Backend) -> AbstractContextManager[nn.Module]:
    """The model that `evaluate` hands to the task. Entered on all ranks.

    Where the task generates, it is the bare model with whole weights on each rank, gathered once: ranks that decode
    different lengths call it differently often, and a sharded model would wait for ever in a collective.
    """
    return backend.whole() if task.generates else nullcontext(backend.model)


@torch.no_grad()
def evaluate(
    task: Task, model: nn.Module, ranks: Ranks, *, split: str = "val", num_samples: int | None, micro_batch_size: int,
    num_workers: int = 0, progress: bool = True, before_batch: Callable[[], None] = lambda: None,
    show_in: Path | None = None,
) -> dict[str, float]:  # fmt: skip
    """The metrics of a split. Called on all ranks, which all get the same.

    Every rank runs the same number of batches; places without a sample carry no weight, and no sample counts twice.
    What the task shows of the sums goes into the folder `show_in`. A fault in that is only warned about.
    """
    loader = evaluation_loader(
        task, task.dataset(split), num_samples=num_samples, micro_batch_size=micro_batch_size,
        world_size=ranks.world_size, rank=ranks.rank, num_workers=num_workers, pin_memory=ranks.device.type == "cuda",
    )  # fmt: skip
    was_training = model.training
    model.eval()
    sums: Sums | None = None
    try:
        for batch in tqdm(loader, desc=f"evaluate {split}", leave=False, disable=not (progress and ranks.is_main)):
            before_batch()
            sums = add_sums(sums, task.evaluate(model, to_device(batch, ranks.device)))
    finally:
        model.train(was_training)
    if sums is None:
        raise ConfigError(f"the {split} split has no samples to evaluate")
    sums = sum_over_ranks(sums, ranks)
    if show_in is not None and ranks.is_main:
        try:
            show_in.mkdir(parents=True, exist_ok=True)
            task.show(sums, show_in)
            if not any(show_in.iterdir()):
                show_in.rmdir()
        except Exception as error:  # a picture is worth no run
            tqdm.write(f"warning: {show_in}: is not whole ({type(error).__name__}: {error})", file=sys.stderr)
    return task.summarize(sums)
