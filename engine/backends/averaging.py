"""A moving average of the weights, kept by each rank for the elements that it holds, in fp32.

    average = WeightAverage(backend, settings, statistics)
    average.update(n, applied_steps)        after a step; n updates have been made before
    with average.in_place("evaluation"):    the model has the average for weights

Update n (from 0) is average += (1 - d) (weights - average). The average begins as the weights are at step 0. Here d is
min(decay, (1 + n) / (10 + n)) with `warmup` (TensorFlow's ExponentialMovingAverage with `num_updates`), else `decay`
(torch.optim.swa_utils.get_ema_multi_avg_fn). The weights are the fp32 masters, whatever precision the model runs in.
Statistics of the data, such as BatchNorm's, are averaged alike, as timm's ModelEmaV3 does: they belong to the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from trunkline.engine.backends import Backend
from trunkline.engine.config.weights_section import Ema
from trunkline.engine.ranks.distributed import Ranks, sum_over_ranks
from trunkline.engine.ranks.lookout import StopRequested
from trunkline.engine.state.sharded_state import local_part

_AT_ONCE = 1 << 24  # elements that are held twice while weights and average change places


class WeightAverage:
    """The average of a backend's trainable weights, and of `statistics` of it; of nothing without settings.

    `of` holds it: by the owner of fragments, or by the buffer, a tensor like this rank's part of it. None without
    settings. What this rank has no part of is not in it.
    """

    @torch.no_grad()
    def __init__(self, backend: Backend, settings: Ema | None, statistics: Iterable[Tensor] = ()) -> None:
        self.backend, self.settings = backend, settings
        self.of: dict[Tensor, Tensor] | None = None
        if settings is not None:
            trained = {name for name, parameter in backend.module.named_parameters() if parameter.requires_grad}
            owners = [part.owner for part in backend.fragments() if part.name in trained and part.length]
            floating = [buffer for buffer in statistics if buffer.is_floating_point()]
            self.of = {owner: local_part(owner).clone() for owner in [*owners, *floating]}

    @torch.no_grad()
    def update(self, updates: int, applied_steps: int) -> int:
        """Take in the weights after `applied_steps` steps, if it is time to; the number of updates made by then."""
        if self.settings is None or self.of is None:
            return 0
        if applied_steps % self.settings.every:
            return updates
        decay = self.settings.decay
        if self.settings.warmup:
            decay = min(decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(list(self.of.values()), [local_part(owner) for owner in self.of], 1 - decay)
        return updates + 1

    @torch.no_grad()
    def agree(self, buffers: Iterable[Tensor], ranks: Ranks) -> None:
        """Make the averages of these buffers the same on all ranks, by their mean. Called on all ranks."""
        averages = [self.of[buffer] for buffer in buffers if buffer in self.of] if self.of else []
        if averages:
            totals = sum_over_ranks({str(n): average.double() for n, average in enumerate(averages)}, ranks)
            for average, total in zip(averages, totals.values(), strict=True):
                average.copy_(total / ranks.world_size)

    def serves(self, use: str) -> bool:
        """Whether the average stands for the weights in this use."""
        return self.settings is not None and use in self.settings.use

    @contextmanager
    def in_place(self, use: str) -> Iterator[None]:
        """Within, the model has the average for weights, if that is configured for this use. Entered on all ranks.

        After an error that is not of all ranks alike, only what this rank holds is put back.
        """
        if not self.serves(use):
            yield
            return
        self._exchange()
        self.backend.refresh()
        try:
            yield
        except BaseException as error:
            self._exchange()
            if isinstance(error, StopRequested):  # the run is saved, with the loss of a sample
                self.backend.refresh()
            raise
        self._exchange()
        self.backend.refresh()

    @torch.no_grad()
    def _exchange(self) -> None:
        assert self.of is not None
        for owner, average in self.of.items():
            rows = max(1, _AT_ONCE * max(1, len(torch.atleast_1d(average))) // max(1, average.numel()))
            pairs = zip(
                torch.atleast_1d(local_part(owner)).split(rows), torch.atleast_1d(average).split(rows), strict=True
            )
            for mine, theirs in pairs:
                held = mine.clone()
                mine.copy_(theirs)
                theirs.copy_(held)
