"""Texts from a network: images sampled from pure noise, and decoded.

    frames(network, length, ...)       the images on the way from noise, the last one clean
    kept(frames)                       the last ones, and the way of the first image
    read_once(network, x, t, ...)      the tokens that it reads in noisy images, in one step
    until_end(tokens, length, eos)     the tokens up to EOS

Steps are even in the network's own time: with the noise "information", each tells as much.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from trunkline.engine.data.randomness import mix, normal
from trunkline.models.token_image.denoiser import Denoiser
from trunkline.models.token_image.noise import LAST
from trunkline.models.token_image.sampler import Method, evenly, trajectory
from trunkline.models.token_image.validation import decoded

Condition = tuple[Tensor, Tensor] | tuple[()]
"""A condition's clean image and its pixels that hold a token, as the network takes them; nothing for none."""


class Frame(NamedTuple):
    """x: the images after a step. guess: the clean images that the network saw in them. Both [B, S, S, C]."""

    x: Tensor
    guess: Tensor


@torch.no_grad()
def frames(
    network: Denoiser, size: int, length: Tensor, *, steps: int, method: Method, seed: int = 0, first: int = 0,
    condition: Condition = (), given: tuple[Tensor, Tensor] | None = None,
) -> Iterator[Frame]:  # fmt: skip
    """What each step makes of pure noise.

    Sample i has noise of its own, by the seed and first + i, whatever else is in the batch.

    Args:
        length: [B], pixels that hold a token; the others are padding, which nothing attends to
        given: tokens that are known, int64 [B, S S], and which are, bool [B, S S]
    """
    device = length.device
    keys = torch.tensor([mix(seed, first + place) for place in range(len(length))], device=device)
    noise = normal(keys, (size, size, network.encoding.channels), stream=1)
    held = (torch.arange(size**2, device=device) < length[:, None]).view(-1, size, size)
    guess = torch.zeros_like(noise)

    def denoise(x: Tensor, alpha: Tensor) -> Tensor:
        nonlocal guess
        t = network.time(alpha).expand(len(x))
        guess = network.clean(network(x, t, held, *condition, previous=guess if network.self_conditioning else None))
        return guess

    known = {}
    if given is not None:
        pixels = network.encoding.encode(given[0]).view(noise.shape)
        known = {"given": pixels, "is_given": given[1].view(-1, size, size, 1)}
    for x in trajectory(denoise, noise, alphas_of(network, steps), method=method, keys=keys, **known):
        yield Frame(x, guess)


def kept(steps: Iterable[Frame]) -> tuple[Frame, list[Frame]]:
    """The frame of the last step, and of each step that of the first image alone: all steps of all images are large."""
    way = []
    for last in steps:
        way.append(Frame(last.x[0].clone(), last.guess[0].clone()))
    return last, way


@torch.no_grad()
def read_once(network: Denoiser, x: Tensor, t: Tensor, held: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    """The tokens [B, S, S] that the network reads in noisy images, and its guess of the clean ones.

    With self-conditioning it sees its own first guess.
    """
    output = network(x, t, held, *condition)
    if network.self_conditioning:
        output = network(x, t, held, *condition, previous=network.clean(output))
    return decoded(output, network.encoding, network.gives_logits)


def alphas_of(network: Denoiser, steps: int) -> Tensor:
    """fp32 [steps + 1], from 0 to 1, even in the network's time. Raises ValueError for no step."""
    alphas = network.alpha(LAST * (1 - evenly(steps).to(network.codes.device)))
    alphas[0], alphas[-1] = 0, 1  # a curve of information ends before
    return alphas


def until_end(tokens: Tensor, length: Tensor, eos: int) -> list[list[int]]:
    """Of each image its tokens, of int64 [B, S, S], up to the first EOS, that included, or all `length`."""
    found = []
    for row, count in zip(tokens.flatten(1).tolist(), length.tolist(), strict=True):
        row = row[:count]
        found.append(row[: row.index(eos) + 1] if eos in row else row)
    return found
