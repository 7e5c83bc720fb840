from __future__ import annotations

import numpy as np
import pytest

from trunkline.models.token_image.ngrams import NGrams, copied, distinct

FREQUENCIES = np.array([0.5, 0.25, 0.125, 0.125])
TEXTS = [np.array([0, 1, 0, 2]), np.array([1, 0, 1])]


def by_hand(window: list[int], place: int, order: int) -> float:
    """Witten-Bell by the definition, with counts made one by one."""
    token = window[place]
    if order == 1:
        return float(FREQUENCIES[token])
    lower = by_hand(window, place, order - 1)
    if place < order - 1:
        return lower
    context = window[place - order + 1 : place]
    after = [
        int(text[at + order - 1])
        for text in TEXTS for at in range(len(text) - order + 1) if list(text[at : at + order - 1]) == context
    ]  # fmt: skip
    return (after.count(token) + len(set(after)) * lower) / (len(after) + len(set(after))) if after else lower


@pytest.mark.parametrize("window", [[0, 1, 0, 2], [1, 0, 1, 0, 1, 2], [3, 3, 0], [2, 0, 1], [1]])
def test_every_order_is_witten_and_bells(window: list[int]) -> None:
    model = NGrams.fit(TEXTS, FREQUENCIES, 4)
    found = np.exp(model.log_probabilities([np.array([2, 0]), np.array(window)]))[:, 2:]
    wanted = [[by_hand(window, place, order) for place in range(len(window))] for order in (1, 2, 3, 4)]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_a_hand_made_count() -> None:
    """After 0 came 1 and 2 and 1: p(1 | 0) = (2 + 2 x .25) / (3 + 2). After 2 came nothing: the frequency."""
    model = NGrams.fit(TEXTS, FREQUENCIES, 2)
    assert np.exp(model.log_probabilities([np.array([0, 1])]))[1, 1] == pytest.approx(2.5 / 5)
    assert np.exp(model.log_probabilities([np.array([2, 1])]))[1, 1] == pytest.approx(0.25)


def test_each_order_sums_to_1_over_what_may_follow() -> None:
    model = NGrams.fit(TEXTS, FREQUENCIES, 3)
    for context in ([0, 1], [1, 0], [3, 2], [2, 0]):
        ends = [np.array([*context, token]) for token in range(4)]
        last = np.exp(model.log_probabilities(ends)).reshape(3, 4, 3)[:, :, 2]
        np.testing.assert_allclose(last.sum(1), 1)


def test_the_table_of_transitions_is_order_2() -> None:
    model = NGrams.fit(TEXTS, FREQUENCIES, 3)
    pairs = [np.array([before, after]) for before in range(4) for after in range(4)]
    wanted = np.exp(model.log_probabilities(pairs)[1, 1::2]).reshape(4, 4)
    np.testing.assert_allclose(model.transitions(), wanted, rtol=1e-12)


def test_texts_too_short_for_an_order_leave_the_order_below() -> None:
    model = NGrams.fit([np.array([1]), np.array([], np.int64)], FREQUENCIES, 4)
    np.testing.assert_allclose(np.exp(model.log_probabilities([np.array([1, 2, 3])])), [FREQUENCIES[1:]] * 4)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 6, 24])
def test_copied_stretches_are_those_that_a_text_holds(length: int) -> None:
    random = np.random.default_rng(0)
    texts = [random.integers(0, 3, size) for size in (200, 7, 90)]
    pieces = [random.integers(0, 3, 40), texts[0][50:90], texts[2][80:], random.integers(0, 3, 4)]
    held = {tuple(text[at : at + length]) for text in texts for at in range(len(text) - length + 1)}
    wanted = [tuple(p[at : at + length]) in held for p in pieces for at in range(len(p) - length + 1)]
    assert copied(pieces, texts, length).tolist() == wanted


def test_distinct_stretches_are_counted_once() -> None:
    assert distinct([np.array([1, 2, 1, 2]), np.array([2, 1]), np.array([1])], 2) == pytest.approx(2 / 4)
    assert distinct([np.array([1])], 2) == 0
