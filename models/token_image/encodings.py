"""Tokens as channels of pixels, and back without loss.

    rgb    3 channels: the digits of the id in base 256, divided by 255. One digit more or less is .0039
    bits   as many channels as the vocabulary needs: the bits of the id, the highest first, as -1 and +1

Chen, Zhang and Hinton, "Analog Bits" (2023), for the bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["rgb", "bits"]
RGB_CAPACITY = 256**3


@dataclass(frozen=True)
class Encoding:
    """How the ids 0 ... vocab_size - 1 become channels. Raises ValueError for more ids than it can tell apart."""

    kind: Kind
    vocab_size: int

    def __post_init__(self) -> None:
        if not 1 <= self.vocab_size <= RGB_CAPACITY:
            raise ValueError(f"a vocabulary of {self.vocab_size} tokens: use 1 to {RGB_CAPACITY}")

    @property
    def channels(self) -> int:
        """Numbers of a pixel."""
        return 3 if self.kind == "rgb" else max(1, (self.vocab_size - 1).bit_length())

    @property
    def min_distance(self) -> float:
        """Between the channels of two tokens."""
        return 1 / 255 if self.kind == "rgb" else 2.0

    @property
    def precision(self) -> torch.dtype:
        """In which noisy channels are compared with tokens': what tells digits apart is small beside the digits."""
        return torch.float64 if self.kind == "rgb" else torch.float32

    def encode(self, ids: Tensor) -> Tensor:
        """fp32 [..., channels] of int64 ids [...]."""
        if self.kind == "rgb":
            return torch.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).float() / 255
        return (ids[..., None] >> self._places(ids.device) & 1).float() * 2 - 1

    def decode(self, pixels: Tensor) -> Tensor:
        """The ids [...] whose channels are nearest to [..., channels]; the last id for what is beyond it.

        Values beyond those of any token, and NaN, are decoded, too.
        """
        if self.kind == "rgb":
            digits = (pixels.float() * 255).round().nan_to_num().clamp(0, 255).long()
            ids = (digits * torch.tensor([1, 256, 65536], device=pixels.device)).sum(-1)
        else:
            ids = ((pixels > 0).long() << self._places(pixels.device)).sum(-1)
        return ids.clamp(max=self.vocab_size - 1)

    def _places(self, device: torch.device) -> Tensor:
        return torch.arange(self.channels - 1, -1, -1, device=device)
