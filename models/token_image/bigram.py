"""The exact posterior of tokens given noisy pixels, if tokens follow each other with known probabilities.

    Bigram(frequencies, transitions).posterior(log_likelihood, length)

By forward and backward passes over an image's tokens in the order of the text (Baum et al., 1970).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Bigram:
    """frequencies: fp32 [V], of an image's first token. transitions: fp32 [V, V], by the token before and the token."""

    frequencies: Tensor
    transitions: Tensor

    def posterior(self, log_likelihood: Tensor, length: Tensor) -> Tensor:
        """P(token | all of its image's noisy pixels), fp32 [B, N, V].

        log_likelihood: [B, N, V], of each noisy pixel if the token were v, up to a constant of the pixel.
        length: [B], the image's tokens; what lies behind them tells nothing.
        """
        places = log_likelihood.shape[1]
        inside = torch.arange(places, device=length.device) < length[:, None]
        likelihood = (log_likelihood - log_likelihood.amax(-1, keepdim=True)).exp()
        likelihood = likelihood.where(inside[..., None], 1.0)
        ahead = [_scaled(self.frequencies * likelihood[:, 0])]
        for place in range(1, places):
            ahead.append(_scaled(ahead[-1] @ self.transitions * likelihood[:, place]))
        behind = [torch.ones_like(ahead[0])]
        for place in range(places - 1, 0, -1):
            behind.append(_scaled((behind[-1] * likelihood[:, place]) @ self.transitions.T))
        return _scaled(torch.stack(ahead, 1) * torch.stack(behind[::-1], 1))


def _scaled(x: Tensor) -> Tensor:
    """x, divided by its sum over the last dimension. Entries that fp32 rounds to 0 are raised to its least number."""
    x = x.clamp(min=torch.finfo(x.dtype).tiny)
    return x / x.sum(-1, keepdim=True)
