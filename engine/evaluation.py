"""Evaluation: exact metrics over the whole validation set, whatever the number of ranks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from trunkline.engine.backends import Backend
from trunkline.engine.data.loading import evaluation_loader
from trunkline.engine.errors import ConfigError
from trunkline.engine.machine.log import LOG, bars_are_hidden
from trunkline.engine.ranks.distributed import Ranks, gather, sum_over_ranks
from trunkline.engine.task import Batch, Sums, Task, add_sums

_APART = 0.2
_ENOUGH = 100  # samples a rank: the means of fewer lie apart by chance


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
    has_samples = False
    try:
        for batch in tqdm(
            loader, desc=f"evaluate {split}", leave=False, disable=not (progress and ranks.is_main) or bars_are_hidden()
        ):
            before_batch()
            has_samples = has_samples or bool(batch["valid"].any())
            sums = add_sums(sums, task.evaluate(model, to_device(batch, ranks.device)))
    finally:
        model.train(was_training)
    if sums is None:
        raise ConfigError(f"the {split} split has no samples to evaluate")
    if ranks.world_size > 1:
        own = gather(_own_loss(task, sums) if has_samples else None, ranks)
        _compare_ranks(split, own, ranks, few=len(loader) * micro_batch_size < _ENOUGH)
    sums = sum_over_ranks(sums, ranks)
    if show_in is not None and ranks.is_main:
        try:
            show_in.mkdir(parents=True, exist_ok=True)
            task.show(sums, show_in)
            if not any(show_in.iterdir()):
                show_in.rmdir()
        except Exception as error:  # a picture is worth no run
            LOG.warning(f"{show_in}: is not whole ({type(error).__name__}: {error})")
    return task.summarize(sums)


def _own_loss(task: Task, sums: Sums) -> float | None:
    try:
        return task.summarize(sums).get("loss")
    except Exception:  # a part may lack what the whole has, and the other ranks wait for this one
        return None


def _compare_ranks(split: str, by_rank: Sequence[float | None], ranks: Ranks, few: bool = False) -> None:
    """Say how the ranks' own mean losses spread, and warn if one is far from their mean. None: it had no samples.

    No mean of `few` samples is far.

    Metrics do not depend on who evaluated what. Here a rank shows whose weights or data are not those of the others.
    """
    losses = [loss for loss in by_rank if loss is not None and math.isfinite(loss)]
    if not ranks.is_main:
        return
    if broken := [rank for rank, loss in enumerate(by_rank) if loss is not None and not math.isfinite(loss)]:
        LOG.warning(
            f"the {split} loss of the samples of ranks {broken} is not finite: none of them counts, or these ranks' "
            "weights or data are not those of the others"
        )
    if len(losses) < 2:
        return
    mean, spread = statistics.fmean(losses), statistics.pstdev(losses)
    said = f"mean {mean:.6g}, std {spread:.3g}, min {min(losses):.6g}, max {max(losses):.6g}"
    LOG.info(f"{split} loss of the ranks' own samples: {said}")
    farthest = max(losses, key=lambda loss: abs(loss - mean))
    if not few and abs(farthest - mean) > _APART * abs(mean):
        # of two ranks, either may be the one that is wrong
        who = f"rank {by_rank.index(farthest)}'s own {split} loss is {farthest:.6g}," if len(losses) > 2 else (
            f"the two ranks' own {split} losses are {losses[0]:.6g} and {losses[1]:.6g},"
        )  # fmt: skip
        LOG.warning(
            f"{who} more than {_APART:.0%} off the ranks' mean: this is chance, or a rank's weights or data are not "
            "those of the others"
        )
