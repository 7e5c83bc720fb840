"""Tables by context, on languages whose answers can be told by hand."""

from __future__ import annotations

import itertools

from trunkline.benchmarks.context_table import LETTER_WINDOWS, WORD_WINDOWS, ContextTable, words

ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def test_words_are_told_apart_at_spaces_and_hyphens() -> None:
    assert words("forty-five  thousand été") == ["forty", "five", "thousand", "été"]


def test_a_word_that_always_means_the_same_is_found_among_others() -> None:
    said = itertools.product(range(10), repeat=2)
    pairs = [(f"{ONES[a]} {ONES[b]}", f"{a}{b}") for a, b in said]
    table = ContextTable(pairs, words, WORD_WINDOWS)
    assert table.answers(["three one four one five", "nine"]) == ["31415", "9"]
    assert table.answers(["three what one", ""]) == ["31", ""]  # a word that was never seen says nothing


def test_a_word_may_mean_no_digit_or_several() -> None:
    pairs = [(f"{ONES[a]} and {ONES[b]} dozen", f"{a}{b}12") for a, b in itertools.product(range(10), repeat=2)]
    assert ContextTable(pairs, words, WORD_WINDOWS).answers(["six and seven dozen"]) == ["6712"]


def test_the_neighbours_decide_where_a_word_alone_does_not() -> None:
    """ "ty" is 0 at the end, and nothing before another digit."""
    pairs = [(f"{ONES[a]} ty {ONES[b]}", f"{a}{b}") for a in range(2, 10) for b in range(1, 10)]
    pairs += [(f"{ONES[a]} ty", f"{a}0") for a in range(2, 10)] * 4
    pairs += [(ONES[a], f"{a}") for a in range(1, 10)] * 4
    held = ("six ty seven", "six ty")
    table = ContextTable([pair for pair in pairs if pair[0] not in held], words, WORD_WINDOWS)
    assert table.answers(held) == ["67", "60"]


def test_the_widest_window_that_was_seen_wins() -> None:
    """ "x" is 1; between "b" and "c" it is 2."""
    pairs = [("x", "1"), ("a x", "1"), ("x a", "1"), ("b x c", "2"), ("b x", "1"), ("x c", "1")] * 10
    table = ContextTable(pairs, str.split, ((1, 1), (0, 0)))
    assert table.answers(["b x c", "c x b", "b x x c"]) == ["2", "1", "11"]


def test_letters_are_units_too() -> None:
    pairs = [(f"{ONES[a]}{ONES[b]}", f"{a}{b}") for a, b in itertools.product(range(10), repeat=2) if (a, b) != (4, 7)]
    assert ContextTable(pairs, list, LETTER_WINDOWS).answers(["fourseven"]) == ["47"]


def test_the_same_pairs_give_the_same_table() -> None:
    pairs = [(f"{ONES[a]} ty {ONES[b]}", f"{a}{b}") for a, b in itertools.product(range(10), repeat=2)]
    prompts = [prompt for prompt, _ in pairs] + ["ty", "two two"]
    one, other = (ContextTable(pairs, words, WORD_WINDOWS).answers(prompts) for _ in range(2))
    assert one == other


def test_an_answer_too_long_for_its_prompt_is_passed_over() -> None:
    table = ContextTable([("a b", "12")] * 9 + [("a", "123456")], words, WORD_WINDOWS)
    assert table.answers(["a b"]) == ["12"]
