"""Texts that a network made up, beside held-out texts of the same lengths.

No text is asked of a sample: it is scored by what a model of the training texts expects, by how little it repeats, and
by how much of it stands in the training texts word for word.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from trunkline.models.token_image.ngrams import NGrams, Tokens, copied, distinct

COPIED = 24
"""Tokens of a stretch that is called copied if the training texts hold it."""
_DISTINCT = (1, 2, 4)


def scores(pieces: Sequence[Tokens], texts: Sequence[Tokens], model: NGrams) -> dict[str, float]:
    """By name, of token sequences: n-gram bits a token, the shares of n-grams that are different and of copied ones."""
    found: dict[str, float] = {"tokens": sum(map(len, pieces))}
    if not found["tokens"]:
        return found
    bits = -model.log_probabilities(pieces).mean(1) / math.log(2)
    found |= {f"{order}-gram bits": float(value) for order, value in enumerate(bits, 1)}
    found |= {f"distinct {length}-grams": distinct(pieces, length) for length in _DISTINCT}
    stretches = copied(pieces, texts, COPIED)
    return found | {f"copied {COPIED}-grams": float(stretches.mean()) if len(stretches) else 0.0}


def alike(pieces: Sequence[Tokens], lengths: Sequence[int]) -> list[Tokens]:
    """The pieces, cut to these lengths, so that what is counted of them can be compared."""
    return [np.asarray(piece[:length]) for piece, length in zip(pieces, lengths, strict=True)]
