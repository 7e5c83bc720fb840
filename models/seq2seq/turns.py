"""Several turns of a talk as what the encoder reads: each turn's tokens and EOS, one turn after another.

    joined(turns, eos, most)           within `most` tokens; the oldest turns are left out first
    between(turns, eos)                all of them, EOS only between two: as a store holds them
    kept_from(lengths, ends, most)     where what `joined` keeps begins, of many of these at once

The last turn is the prompt. It is never left out; where it alone is too long, it is cut off on the right and keeps its
EOS.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def joined(turns: Sequence[Sequence[int]], eos: int, most: int) -> list[int]:
    """What the encoder reads of `turns`, the tokens of each without EOS: `most` tokens at most, EOS last."""
    tokens = between(turns, eos)
    ends = np.cumsum([len(turn) + 1 for turn in turns])[:-1] - 1
    start = int(kept_from(np.array([len(tokens)]), ends, most)[0])
    return [*tokens[start : start + most - 1], eos]


def between(turns: Sequence[Sequence[int]], eos: int) -> list[int]:
    """The tokens of `turns` with EOS between two of them."""
    return [token for number, turn in enumerate(turns) for token in ([eos] * (number > 0) + list(turn))]


def kept_from(lengths: np.ndarray, ends: np.ndarray, most: int) -> np.ndarray:
    """How many tokens each of several inputs, made by `between`, loses in front: int64 [N].

    lengths: int64 [N], tokens of each
    ends: int64 [E], the places of EOS where the inputs lie end to end, ascending
    """
    stops = np.cumsum(lengths)
    begins = stops - lengths
    last = np.searchsorted(ends, stops) - 1  # the EOS before the prompt, perhaps another input's
    turn = np.minimum(np.searchsorted(ends, np.maximum(stops - most, begins)), last)
    starts = np.append(ends, -1)[turn] + 1
    return np.where((lengths < most) | (starts < begins), 0, starts - begins)
