"""Randomness as a pure function of keys.

It is the same on any rank, on any device and with any number of workers.

    mix(*keys)               one int64 from several: seed, epoch, index, ...
    seed_torch(*keys)        torch's own generators, for what a model draws itself (dropout)
    uniform(keys, shape)     [B, *shape] fp32 in (0, 1), from int64 keys [B]
    normal(keys, shape)      [B, *shape] fp32, standard normal

Integers are mixed by splitmix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
2014), in two's complement, which torch and numpy both wrap silently.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

GENERATOR = 2
"""Which numbers the functions here make of a key. A checkpoint names it."""
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix(*keys: int) -> int:
    """An int64 (as a signed Python int) that depends on every key and on their order."""
    state = 0
    for key in keys:
        state = _finalise_int((state + _GOLDEN + (int(key) & _MASK)) & _MASK)
    return state - (1 << 64) if state >= 1 << 63 else state


def mix_last(keys: np.ndarray, *first: int) -> np.ndarray:
    """[mix(*first, key) for key in keys], int64 [N], at numpy's speed."""
    z = keys.astype(np.int64).astype(np.uint64) + np.uint64((mix(*first) + _GOLDEN) & _MASK)
    return finalise_array(z).astype(np.int64)


def finalise_array(z: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser on each element of uint64 [N]: every bit of the result depends on every bit."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def seed_torch(*keys: int) -> None:
    """Seed torch's global generators from keys. torch.manual_seed does the same some hundred times slower."""
    seed = mix(*keys)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


def _finalise_int(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _signed(z: int) -> int:
    return z - (1 << 64) if z >= 1 << 63 else z


def _shift_right(z: Tensor, bits: int) -> Tensor:
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)  # int64 shifts arithmetically; the mask makes it logical


def _finalise(z: Tensor) -> Tensor:
    z = _shift_right(z, 30).bitwise_xor_(z).mul_(_signed(0xBF58476D1CE4E5B9))
    z = _shift_right(z, 27).bitwise_xor_(z).mul_(_signed(0x94D049BB133111EB))
    return _shift_right(z, 31).bitwise_xor_(z)


def uniform(keys: Tensor, shape: Sequence[int], stream: int = 0) -> Tensor:
    """Uniform numbers of the open interval (0, 1): [B, *shape] fp32 from int64 `keys` [B].

    `stream`, 0 or more, separates several draws that are made with one key.
    """
    bits = (_words(keys, math.prod(shape), stream) >> 40).to(torch.int32).bitwise_and_((1 << 24) - 1)
    return bits.to(torch.float32).add_(0.5).mul_(2.0**-24).view(len(keys), *shape)


def normal(keys: Tensor, shape: Sequence[int], stream: int = 0) -> Tensor:
    """Standard normal numbers: [B, *shape] fp32 from int64 `keys` [B]. They share no stream with `uniform`.

    By Box-Muller, which makes two numbers of 64 random bits: 31 are the radius, 32 the angle, and one is not used.
    """
    count = math.prod(shape)
    pairs = (count + 1) // 2
    halves = _words(keys, pairs, ~stream).view(torch.int32).view(len(keys), 2, pairs)
    radius, angle = halves.transpose(0, 1).to(torch.float32, memory_format=torch.contiguous_format)
    radius.add_(0.5).abs_().mul_(2.0**-31).log_().mul_(-2.0).sqrt_()
    angle.mul_(2 * math.pi * 2.0**-32)
    sines = angle.sin().mul_(radius)[:, : count - pairs]
    return torch.cat([angle.cos_().mul_(radius), sines], dim=1).view(len(keys), *shape)


def _words(keys: Tensor, count: int, stream: int) -> Tensor:
    """int64 [B, count], every bit of which is random."""
    steps = torch.arange(count, device=keys.device, dtype=torch.int64).add_(stream << 40).mul_(_signed(_GOLDEN))
    return _finalise(_finalise(keys)[:, None] + steps)
