"""Checks of single arguments, and the dtype that autocast asks for.

Numbers are Python's: a tensor would wait for its device, and lose the gradient that it may be there for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_tensors(**tensors: Any) -> None:
    """ValueError for what is no tensor."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor; got a {type(x).__name__}")


def check_integer(name: str, value: Any, least: int) -> None:
    """ValueError for what is no Python integer, is below `least` or does not fit 64 bits."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
        raise ValueError(f"{name} must be an integer of at least {least}; got {_kind(value)}")


def check_positive(name: str, value: Any) -> None:
    """ValueError for what is no Python number, is not above 0 or is not finite in fp32."""
    largest = torch.finfo(torch.float32).max
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= largest:
        raise ValueError(f"{name} must be a number, finite and above 0; got {_kind(value)}")


def _kind(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.80}"


def autocast_dtype(x: Tensor) -> torch.dtype:
    """That of autocast, where it is on and x takes part in it, else x's own."""
    device = x.device.type
    if not x.is_floating_point() or x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
