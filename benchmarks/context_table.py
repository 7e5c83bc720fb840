"""ContextTable: what each word, or letter, of a prompt becomes, looked up by its neighbours.

    table = ContextTable(pairs, words, WORD_WINDOWS)       prompts, and their answers in digits
    table.answers(prompts)

What a person may write who has pairs and no network. Each unit of a prompt stands for 0 to 3 digits of the answer, in
order. Which ones is found by expectation maximization, as for letters and sounds. An answer is then put together unit
by unit, each by the widest window of neighbours that was seen with it, and what it most often stood for there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numba
import numpy as np

Pair = tuple[str, str]
Window = tuple[int, int]
"""How many units before and after one are looked at."""

WORD_WINDOWS = ((3, 3), (2, 3), (2, 2), (1, 2), (1, 1), (0, 1), (1, 0), (0, 0))
LETTER_WINDOWS = tuple((size, size) for size in (20, 16, 12, 10, 8, 6, 5, 4, 3, 2, 1, 0))

_LONGEST = 3  # digits of a unit
_FIRST = np.array([0, 1, 11, 111, 1111])  # of the codes of 0, 1, 2 and 3 digits
_CODE_BITS = 11
_RARE = 5  # a word that stands in fewer prompts is one of many that are not told apart: most are typing errors
_ALIGNED = 24_000  # pairs, from which it is learnt what units stand for
_ROUNDS = 8


def words(prompt: str) -> list[str]:
    """Its words, without hyphens."""
    return re.findall(r"\w+", prompt)


class ContextTable:
    """Fitted on pairs whose answers are digits. `windows` from the widest to the one of no neighbour."""

    def __init__(self, pairs: Sequence[Pair], units: Callable[[str], list[str]], windows: Sequence[Window]) -> None:
        self._units, self._windows = units, windows
        split = [units(prompt) for prompt, _ in pairs]
        counts = Counter(unit for each in split for unit in set(each))
        common = sorted(unit for unit, count in counts.items() if count >= min(_RARE, len(pairs) // 100))
        self._ids = {unit: number for number, unit in enumerate(common, 2)}  # 0: outside of the prompt; 1: rare
        random = np.random.default_rng(0)
        self._mark = random.integers(1 << 63, size=len(common) + 2, dtype=np.uint64)
        width = max(max(window) for window in windows)
        self._factor = random.integers(1 << 63, size=2 * width + 1, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._margin = width

        flat, starts = self._flat(split)
        digits = np.array([int(digit) for _, answer in pairs for digit in answer], np.int64)
        ends = np.concatenate([[0], np.cumsum([len(answer) for _, answer in pairs])])
        chance = self._learn(flat, starts, digits, ends)
        codes = np.full(len(flat), -1)
        _align(flat, starts, digits, ends, np.log(chance + 1e-300), codes)
        at = np.flatnonzero(codes >= 0)
        self._tables = [_most_frequent(self._keys(flat, window)[at], codes[at]) for window in windows]

    def answers(self, prompts: Sequence[str]) -> list[str]:
        """What the table makes of each."""
        flat, starts = self._flat([self._units(prompt) for prompt in prompts])
        codes = np.full(len(flat), -1)
        for window, (keys, found) in zip(self._windows, self._tables, strict=True):
            asked = self._keys(flat, window)
            place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
            codes = np.where((codes < 0) & (keys[place] == asked), found[place], codes)
        return [
            "".join(_digits(code) for code in codes[first:stop] if code > 0)
            for first, stop in zip(starts[:, 0], starts[:, 1], strict=True)
        ]

    def _flat(self, split: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of units of all prompts, 0 between them, and where each prompt starts and stops, [P, 2]."""
        ids, starts = [0] * self._margin, []
        for units in split:
            starts.append((len(ids), len(ids) + len(units)))
            ids += [self._ids.get(unit, 1) for unit in units] + [0] * self._margin
        return np.array(ids), np.array(starts).reshape(-1, 2)

    def _keys(self, flat: np.ndarray, window: Window) -> np.ndarray:
        """A number for each place that names the units in its window."""
        keys, marks, middle = np.zeros(len(flat), np.uint64), self._mark[flat], self._margin
        for offset in range(-window[0], window[1] + 1):
            keys += np.roll(marks, -offset) * self._factor[middle + offset]
        return keys >> np.uint64(_CODE_BITS)

    def _learn(self, flat: np.ndarray, starts: np.ndarray, digits: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """[units, codes]: how likely a unit stands for these digits."""
        length_of = np.repeat(np.arange(_LONGEST + 1), np.diff(_FIRST))
        chance = np.tile(0.1**length_of / (_LONGEST + 1), (len(self._mark), 1))  # all alignments are as likely
        step = max(1, len(starts) // _ALIGNED)
        for _ in range(_ROUNDS):
            counts = np.zeros_like(chance)
            _expect(flat, starts, digits, ends, step, chance, counts)
            chance = counts / np.maximum(counts.sum(1, keepdims=True), 1e-300)
        return chance


def _digits(code: int) -> str:
    length = int(np.searchsorted(_FIRST, code, side="right")) - 1
    return f"{code - _FIRST[length]:0{length}d}"


def _most_frequent(keys: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each key once, ascending, and its most frequent code."""
    both, counts = np.unique((keys << np.uint64(_CODE_BITS)) | codes.astype(np.uint64), return_counts=True)
    keys, codes = both >> np.uint64(_CODE_BITS), (both & np.uint64((1 << _CODE_BITS) - 1)).astype(np.int64)
    order = np.lexsort((-counts, keys))
    first = np.append(True, np.diff(keys[order]) != 0)
    return keys[order][first], codes[order][first]


@numba.njit(cache=True)
def _code(digits, start, length):  # type: ignore[no-untyped-def]
    value = 0
    for place in range(start, start + length):
        value = 10 * value + digits[place]
    return _FIRST[length] + value


@numba.njit(cache=True)
def _expect(flat, starts, digits, ends, step, chance, counts):  # type: ignore[no-untyped-def]
    """Add to `counts` how often each unit stands for each code, over all alignments by their likelihood."""
    for pair in range(0, len(starts), step):
        first, n = starts[pair, 0], starts[pair, 1] - starts[pair, 0]
        start, m = ends[pair], ends[pair + 1] - ends[pair]
        ahead, behind = np.zeros((n + 1, m + 1)), np.zeros((n + 1, m + 1))
        ahead[0, 0] = behind[n, m] = 1.0
        for i in range(n):
            for j in range(m + 1):
                for length in range(min(_LONGEST, m - j) + 1):
                    ahead[i + 1, j + length] += ahead[i, j] * chance[flat[first + i], _code(digits, start + j, length)]
        if ahead[n, m] == 0.0:
            continue
        for i in range(n - 1, -1, -1):
            for j in range(m + 1):
                for length in range(min(_LONGEST, m - j) + 1):
                    code = _code(digits, start + j, length)
                    rest = chance[flat[first + i], code] * behind[i + 1, j + length]
                    behind[i, j] += rest
                    counts[flat[first + i], code] += ahead[i, j] * rest / ahead[n, m]


@numba.njit(cache=True)
def _align(flat, starts, digits, ends, chance, codes):  # type: ignore[no-untyped-def]
    """Write the code of each unit in the likeliest alignment; -1 where a pair has none. `chance`: logarithms."""
    for pair in range(len(starts)):
        first, n = starts[pair, 0], starts[pair, 1] - starts[pair, 0]
        start, m = ends[pair], ends[pair + 1] - ends[pair]
        best, came = np.full((n + 1, m + 1), -np.inf), np.zeros((n + 1, m + 1), np.int64)
        best[0, 0] = 0.0
        for i in range(n):
            for j in range(m + 1):
                for length in range(min(_LONGEST, m - j) + 1):
                    score = best[i, j] + chance[flat[first + i], _code(digits, start + j, length)]
                    if score > best[i + 1, j + length]:
                        best[i + 1, j + length], came[i + 1, j + length] = score, length
        j = m
        if best[n, m] == -np.inf:
            continue
        for i in range(n - 1, -1, -1):
            length = came[i + 1, j]
            j -= length
            codes[first + i] = _code(digits, start + j, length)
