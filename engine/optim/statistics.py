"""Buffers that hold statistics of the data, such as BatchNorm's: the same on every rank, and without fillers.

A BatchNorm changes its buffers in place at each forward pass, so they would depend on the number of micro-batches and
differ between ranks. Here every micro-batch of a step begins with the same buffers. The step's are the mean of what the
micro-batches of all ranks make of them, weighted by their samples:

    running <- sum over micro-batches of samples x (running after the micro-batch) / sum of samples

For BatchNorm this is one update with the mean of the micro-batches' statistics, whatever ranks and accumulation steps
they are spread over. `num_batches_tracked` counts steps. A step that is skipped leaves them as they were.

What torch's BatchNorm normalises a batch with remains the statistics of its micro-batch on its rank, as in timm and in
torch without SyncBatchNorm. (timm's `distribute_bn` averages the running ones over ranks once an epoch, unweighted.) So
the gradient is the same for any number of ranks with micro-batches of one size, and differs with that size. It does not
differ where a norm's statistics are those of fixed groups of samples, and the task's `micro_batch_multiple` keeps them
together. A norm that takes a single sample says so by an attribute `takes_single_samples`, and gets no copy beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from trunkline.engine.ranks.distributed import Ranks, sum_over_ranks
from trunkline.engine.task import Batch


class Statistics:
    """The buffers of `model` whose names match one of `globs`. Without any, every method does nothing.

    For each micro-batch of a step: the forward pass, `take`, the backward pass, `put_back`. After the step: `settle`.
    """

    def __init__(self, model: nn.Module, globs: Sequence[str], ranks: Ranks) -> None:
        self.ranks = ranks
        named = [name for name, _ in model.named_buffers() if any(fnmatchcase(name, glob) for glob in globs)]
        self.buffers = [model.get_buffer(name) for name in named]
        holders = [model.get_submodule(name.rpartition(".")[0]) for name in named]
        self._least = 1 if all(getattr(module, "takes_single_samples", False) for module in holders) else 2
        self._before: list[Tensor] = []
        self._sums: list[Tensor] = []
        self.agree()

    def agree(self) -> None:
        """Make them the same on all ranks, by their mean: a checkpoint of an earlier version has those of each rank."""
        self._begin()
        self.take(torch.ones(1, device=self.ranks.device))
        self.settle()

    def begin(self, micro_batches: Sequence[Batch]) -> list[Batch]:
        """Before the first micro-batch of a step: the micro-batches as the model may see them."""
        if not self.buffers:
            return list(micro_batches)
        self._begin()
        return [without_fillers(batch, self._least) for batch in micro_batches]

    @torch.no_grad()
    def _begin(self) -> None:
        self._before = [buffer.clone() for buffer in self.buffers]
        samples = torch.zeros((), device=self.ranks.device)
        self._sums = [torch.zeros_like(each, dtype=torch.float64) for each in [*self.buffers, samples]]

    def take(self, valid: Tensor) -> None:
        """After the forward pass of a micro-batch, whose real samples are those of `valid` [B]. One that is recomputed
        in the backward pass is not counted."""
        if not self.buffers:
            return
        with torch.no_grad():
            samples = valid.sum()
            for total, value in zip(self._sums, [*self.buffers, torch.ones_like(samples)], strict=True):
                # where, because what fillers alone make of a buffer need not be finite
                total += torch.where(samples > 0, value.double() * samples, 0.0)

    def put_back(self) -> None:
        """After the backward pass, or where one was broken off."""
        if not self.buffers:
            return
        with torch.no_grad():
            for buffer, before in zip(self.buffers, self._before, strict=True):
                buffer.copy_(before)

    @torch.no_grad()
    def settle(self) -> None:
        """After a step that was applied. Called on all ranks."""
        if not self.buffers:
            return
        *totals, samples = sum_over_ranks({str(n): each for n, each in enumerate(self._sums)}, self.ranks).values()
        for buffer, total in zip(self.buffers, totals, strict=True):
            mean = total / samples
            buffer.copy_(mean if buffer.is_floating_point() else mean.round())
        self._begin()  # a step that is broken off puts these back


def without_fillers(batch: Batch, least: int = 2) -> Batch:
    """The batch as a model with such buffers may see it: without the samples that fill it up behind the real ones.

    Where there are fewer than `least` real samples, fillers stay, as copies of the last: torch's BatchNorm refuses a
    single value. A batch of fillers alone is left as it is, because other ranks wait for its forward pass. It enters no
    statistic.
    """
    count = int(batch["valid"].sum())
    if count in (0, len(batch["valid"])):
        return batch
    rows = torch.arange(max(least, count)).clamp(max=count - 1)
    return {key: value[rows] for key, value in batch.items()} | {"valid": torch.arange(len(rows)) < count}
