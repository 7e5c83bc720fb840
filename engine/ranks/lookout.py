"""Whether any rank was asked to stop, agreed over all ranks.

Ranks look between two batches of a step or of an evaluation.
"""

from __future__ import annotations

import time

import torch

from trunkline.engine.machine import stopping
from trunkline.engine.ranks.distributed import Ranks, sum_over_ranks

EVERY_MS = 500
"""How often, about: a look is an all-reduce, and waits for what a GPU has to do."""


class StopRequested(Exception):  # noqa: N818  # not an error: the run has to be saved
    """This rank or another was asked to stop, and all ranks know."""


class Lookout:
    """How many calls lie between two looks follows from the ranks' common time, so that all look at the same calls."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._left = self._stride = 1
        self._looked = time.monotonic()

    def look(self) -> None:
        """Raise StopRequested if any rank was asked to stop. Called equally often on all ranks, which agree."""
        self._left -= 1
        if self._left:
            return
        now = time.monotonic()
        mine = [stopping.requested() is not None, int(1000 * (now - self._looked))]  # integers: their sums are exact
        facts = torch.tensor(mine, dtype=torch.float64, device=self.ranks.device)
        stop, took_ms = sum_over_ranks({"facts": facts}, self.ranks)["facts"].tolist()
        if stop:
            raise StopRequested
        within = int(self._stride * EVERY_MS * self.ranks.world_size / max(took_ms, 1.0))
        self._left = self._stride = max(1, min(within, 2 * self._stride))
        self._looked = now
