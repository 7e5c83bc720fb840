"""What an encoder-decoder computes: matrix products, and the pairs of tokens that attend to one another."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

_CROSS_KEYS = ("EncDecAttention.k", "EncDecAttention.v")
"""The decoder's matrices that read the encoder's tokens."""


def forward_flops(lm: Any, sides: np.ndarray) -> float:
    """Floating-point operations of a forward pass over pairs, 2 for a product and its sum.

    lm: transformers' model, with or without values. sides: int64 [P, 2], tokens of the encoder and of the decoder.
    """
    of_input, of_target = _matrices(lm.encoder), 0
    for name, module in lm.decoder.named_modules():
        size = _own(module)
        if name.endswith(_CROSS_KEYS):
            of_input += size
        else:
            of_target += size
    of_target += _own(lm.lm_head)
    config = lm.config
    inputs, targets = sides.astype(np.float64).T
    pairs = config.num_layers * inputs**2 + config.num_decoder_layers * (targets * (targets + 1) / 2 + inputs * targets)
    attention = 4.0 * config.num_heads * config.d_kv * pairs.sum()
    return float(2.0 * (of_input * inputs.sum() + of_target * targets.sum()) + attention)


def _matrices(stack: nn.Module) -> int:
    return sum(_own(module) for module in stack.modules())


def _own(module: nn.Module) -> int:
    return module.weight.numel() if isinstance(module, nn.Linear) else 0
