"""N-gram models of tokens with Witten-Bell smoothing: what a model knows that sees a few tokens back.

    model = NGrams.fit(texts, frequencies, order=4)
    model.log_probabilities(windows)       by order and place, in nats
    copied(pieces, texts, length)          which stretches of `length` tokens are of the texts, word for word

    p_n(w | c) = (count(c w) + kinds(c) p_(n-1)(w | c without its first token)) / (count(c) + kinds(c))

c is the n - 1 tokens before w, kinds(c) the number of different tokens that were seen after it, p_1 the frequencies.
Where c was never seen, p_n is p_(n-1). No n-gram reaches over the start of its text.
Witten and Bell, "The zero-frequency problem" (1991).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Tokens = np.ndarray
"""int64 [n], a text's or a part's."""


@dataclass(frozen=True)
class _Grams:
    """Of one order: key (context's number x V + token) of each n-gram, rising, int64 [M], and how often it was there.

    seen, kinds: by number of the context, fp64 [C]; the numbers are the places in the order below
    """

    keys: np.ndarray
    counts: np.ndarray
    seen: np.ndarray
    kinds: np.ndarray

    def places(self, keys: np.ndarray) -> np.ndarray:
        """Where the keys stand, -1 for one that is not there."""
        found = np.searchsorted(self.keys, keys).clip(max=max(len(self.keys) - 1, 0))
        return np.where(self.keys[found] == keys, found, -1) if len(self.keys) else np.full(keys.shape, -1)


@dataclass(frozen=True)
class NGrams:
    """frequencies: fp64 [V], which sum to 1. orders: of the n-grams of 2, 3, ... tokens."""

    frequencies: np.ndarray
    orders: tuple[_Grams, ...]

    @staticmethod
    def fit(texts: Sequence[Tokens], frequencies: np.ndarray, order: int = 4) -> NGrams:
        """The counts of all n-grams of the texts, up to `order`."""
        vocab_size, stream, place = len(frequencies), *_joined(texts)
        numbers, contexts, orders = stream, vocab_size, []
        for n in range(2, order + 1):
            ends = np.flatnonzero(place >= n - 1)
            before = numbers[ends - 1]
            keys, inverse, counts = np.unique(
                before * vocab_size + stream[ends], return_inverse=True, return_counts=True
            )
            seen = np.bincount(before, minlength=contexts).astype(np.float64)
            kinds = np.bincount(keys // vocab_size, minlength=contexts).astype(np.float64)
            orders.append(_Grams(keys, counts.astype(np.float64), seen, kinds))
            numbers, contexts = np.full(len(stream), -1), max(len(keys), 1)
            numbers[ends] = inverse.reshape(-1)
        return NGrams(np.asarray(frequencies, np.float64), tuple(orders))

    def log_probabilities(self, windows: Sequence[Tokens]) -> np.ndarray:
        """log p_n of each token of the windows, end to end: nats, fp64 [order, tokens]. The first of each sees none."""
        vocab_size, tokens, place = len(self.frequencies), *_joined(windows)
        p, numbers = self.frequencies[tokens], tokens
        found = [p]
        for n, grams in enumerate(self.orders, 2):
            before = np.where(place >= n - 1, np.roll(numbers, 1), -1)
            known = before >= 0
            at = np.where(known, before, 0)
            numbers = np.where(known, grams.places(at * vocab_size + tokens), -1)
            count = np.where(numbers >= 0, grams.counts[numbers] if len(grams.counts) else 0.0, 0.0)
            seen, kinds = np.where(known, grams.seen[at], 0.0), np.where(known, grams.kinds[at], 0.0)
            p = np.where(seen > 0, (count + kinds * p) / np.maximum(seen + kinds, 1.0), p)
            found.append(p)
        return np.log(np.stack(found))

    def transitions(self) -> np.ndarray:
        """p_2 of every pair, fp64 [V, V], by context and token."""
        grams, size = self.orders[0], len(self.frequencies)
        counts = np.zeros(size * size)
        counts[grams.keys] = grams.counts
        seen, kinds = grams.seen[:, None], grams.kinds[:, None]
        smoothed = (counts.reshape(size, size) + kinds * self.frequencies) / np.maximum(seen + kinds, 1.0)
        return np.where(seen > 0, smoothed, self.frequencies)


def copied(pieces: Sequence[Tokens], texts: Sequence[Tokens], length: int) -> np.ndarray:
    """Of each stretch of `length` tokens in the pieces, bool: whether it stands in a text."""
    tokens, place = _joined([*texts, *pieces])
    of_texts = sum(map(len, texts))
    numbers, wide = tokens, 1
    while wide < length:  # the numbers of two stretches that overlap or touch name the one that they make up
        step = min(wide, length - wide)
        pairs = numbers[:-step] * (int(numbers.max(initial=0)) + 1) + numbers[step:]
        numbers, wide = np.unique(pairs, return_inverse=True)[1].reshape(-1), wide + step
    whole = place[length - 1 :] >= length - 1
    starts_in_texts = np.arange(len(whole)) < of_texts
    return np.isin(numbers[whole & ~starts_in_texts], numbers[whole & starts_in_texts])


def distinct(pieces: Sequence[Tokens], length: int) -> float:
    """The share of the pieces' stretches of `length` tokens that are different; 0 where there are none."""
    stretches = [np.lib.stride_tricks.sliding_window_view(piece, length) for piece in pieces if len(piece) >= length]
    together = np.concatenate(stretches) if stretches else np.empty((0, length))
    return len(np.unique(together, axis=0)) / max(len(together), 1)


def _joined(texts: Sequence[Tokens]) -> tuple[np.ndarray, np.ndarray]:
    """The tokens end to end, and the place of each in its text; int64 [N]."""
    empty = np.empty(0, np.int64)
    return np.concatenate([empty, *texts]), np.concatenate([empty, *(np.arange(len(text)) for text in texts)])
