"""Floating-point operations of an image: products of matrices, two for a multiplication and an addition.

    tokens N = condition's places + patches       a block   2 N k + 4 d N^2, k the weights of its linear layers

All places count, also those that attention masks. The backward pass takes twice as many, but for layers whose input
needs no gradient, which take as many: the patch embeddings and what the time modulates. A forward pass of B/4 at
64 x 64 is 126 GFLOP. The usual estimate, 2 x parameters x tokens plus attention, gives 140. It counts the weights of
the time's modulation once per token, but they act once per image. With the official block and no places for a condition
a forward pass is 46 GFLOP, and 138 with its backward pass.
"""

from __future__ import annotations

from math import prod

from trunkline.models.token_image.config import TokenImageModel
from trunkline.models.token_image.encodings import Encoding
from trunkline.models.token_image.network import CONDITION_GRID, swiglu_width


def forward_flops(model: TokenImageModel, size: int, encoding: Encoding, *, conditioned: bool) -> float:
    """Of an image of `size` x `size` pixels, with a condition or without."""
    return sum(_parts(model, size, encoding, conditioned))


def training_flops(model: TokenImageModel, size: int, encoding: Encoding, *, conditioned: bool) -> float:
    """The same, forward and backward; with self-conditioning half the images' estimate too, which is made for all."""
    first, rest, constant = _parts(model, size, encoding, conditioned)
    flops = 2 * first + 3 * rest + constant
    if model.self_conditioning:
        flops += first + rest + constant
        if model.loss == "cross_entropy":  # the estimate is the tokens' mean code
            flops += 2 * size**2 * encoding.vocab_size * encoding.channels
    return float(flops)


def _parts(model: TokenImageModel, size: int, encoding: Encoding, conditioned: bool) -> tuple[float, float, float]:
    """Forward: layers whose input needs no gradient, the rest, and what has no gradient at all."""
    patch, d, layers, _ = model.shape
    pixels, vocab_size, has_prior = prod(patch), encoding.vocab_size, model.prior == "unigram"
    patches = size**2 // pixels
    tokens = patches + CONDITION_GRID**2 * model.condition
    seen = encoding.channels * (1 + model.self_conditioning) + vocab_size * has_prior
    values = vocab_size if model.loss == "cross_entropy" else encoding.channels
    is_official = model.block == "official"
    weights = 4 * d**2 + 3 * d * swiglu_width(d) if is_official else 16 * d**2
    modulation = (6 if is_official else 2) * d**2
    first = 2 * patches * (1 + conditioned) * pixels * seen * d + 2 * layers * modulation
    rest = layers * (2 * tokens * weights + 4 * d * tokens**2) + 2 * patches * (model.stem * d + pixels * values) * d
    return first, rest, 2 * size**2 * vocab_size * encoding.channels * has_prior
