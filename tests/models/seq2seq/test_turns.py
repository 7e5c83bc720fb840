from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trunkline.models.seq2seq.turns import between, joined, kept_from

EOS = 1
TURNS = st.lists(st.lists(st.integers(2, 9), max_size=6), min_size=1, max_size=5)


def by_hand(turns: list[list[int]], most: int) -> list[int]:
    """The rule, turn by turn."""
    turns = list(turns)
    while len(turns) > 1 and sum(len(turn) + 1 for turn in turns) > most:
        turns.pop(0)
    tokens = [token for turn in turns for token in (*turn, EOS)]
    return tokens if len(tokens) <= most else [*tokens[: most - 1], EOS]


def test_a_talk_is_its_turns_each_with_eos() -> None:
    assert joined([[5, 6], [7], [8, 9]], EOS, 100) == [5, 6, EOS, 7, EOS, 8, 9, EOS]
    assert joined([[5, 6], [7], [8, 9]], EOS, 8) == [5, 6, EOS, 7, EOS, 8, 9, EOS]


def test_the_oldest_turns_are_left_out_first_and_the_prompt_last_of_all() -> None:
    turns = [[5, 6], [7], [8, 9]]
    assert joined(turns, EOS, 7) == [7, EOS, 8, 9, EOS]
    assert joined(turns, EOS, 4) == [8, 9, EOS]
    assert joined(turns, EOS, 2) == [8, EOS]


@given(TURNS, st.integers(2, 30))
def test_any_talk_is_joined_by_the_rule(turns: list[list[int]], most: int) -> None:
    assert joined(turns, EOS, most) == by_hand(turns, most)


@given(st.lists(TURNS, min_size=1, max_size=6), st.integers(2, 12))
def test_many_inputs_at_once_begin_where_each_alone_does(talks: list[list[list[int]]], most: int) -> None:
    inputs = [between(turns, EOS) for turns in talks]
    lengths = np.array([len(tokens) for tokens in inputs])
    ends = np.flatnonzero(np.array([token for tokens in inputs for token in tokens], np.int64) == EOS)
    for turns, tokens, start in zip(talks, inputs, kept_from(lengths, ends, most), strict=True):
        assert [*tokens[start : start + most - 1], EOS] == by_hand(turns, most)
