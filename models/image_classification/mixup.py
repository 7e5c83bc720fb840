"""mixup: an image is laid over another, and is of both classes by their shares (Zhang et al., 2018).

pairing = pair(batch, alpha)        None without mixup
pairing.mix(pixels)                 share x image + (1 - share) x its partner's
pairing.expect(of_labels, labels)   share x of_labels(labels) + (1 - share) x of_labels(the partners')

Places 2k and 2k + 1 of the global batch are partners. What stands there is drawn anew in each epoch, and a micro-batch
that holds an even number of places holds whole pairs: so the split into micro-batches and ranks changes nothing. An
image whose partner is a filler stays as it is. Each image has a share of its own, drawn from Beta(alpha, alpha).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trunkline.engine.data.randomness import uniform
from trunkline.engine.task import Batch
from trunkline.models.image_classification.augment import MIXED

PAIR = 2
_QUANTILES = 4096


@dataclass(frozen=True)
class Pairing:
    """share: of the image itself, fp32 [B]; partner: its place, int64 [B]."""

    share: Tensor
    partner: Tensor

    def mix(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S]."""
        return torch.lerp(pixels[self.partner], pixels, self.share[:, None, None, None])

    def expect(self, of_labels: Callable[[Tensor], Tensor], labels: Tensor) -> Tensor:
        """[B]: what `of_labels` makes of the labels [B] and of the partners', by their shares."""
        return torch.lerp(of_labels(labels[self.partner]), of_labels(labels), self.share)


def pair(batch: Batch, alpha: float) -> Pairing | None:
    """The partners in a batch, and the shares."""
    if not alpha:
        return None
    valid = batch["valid"]
    places = torch.arange(len(valid), device=valid.device)
    partner = (places ^ 1).clamp(max=len(valid) - 1)
    partner = torch.where(valid[partner], partner, places)
    table = torch.from_numpy(_beta_quantiles(alpha)).to(valid.device)
    at = uniform(batch["draw"], (), stream=MIXED) * _QUANTILES
    low = at.long()
    return Pairing(torch.lerp(table[low], table[low + 1], at - low), partner)


@lru_cache
def _beta_quantiles(alpha: float) -> NDArray[np.float32]:
    """Those at 0, 1/4096, ..., 1, and one more: between them a straight line is near enough."""
    from scipy.special import betaincinv

    found = betaincinv(alpha, alpha, np.linspace(0, 1, _QUANTILES + 1))
    return np.append(found, 1.0).astype(np.float32)
