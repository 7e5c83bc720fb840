"""Texts into tokens, as they are.

Encoder(tokenizer, marks)(texts)   the tokens of each
    .refusal(texts, tokens)        why a record of these cannot be used
    .notes(tokens)                 what a person should know of it
Converted                          what a workload makes of a record in this way
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


TAKEN = "which the model would take for the real one: remove it"


class Converted(NamedTuple):
    """The tokens of a record, column by column as its store has them, and what a person should know of it."""

    columns: Sequence[Sequence[int]]
    notes: tuple[str, ...] = ()


class Encoder:
    """What becomes one of `marks` is refused: the model would take it for the real one."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, marks: Iterable[int]) -> None:
        self._encoder, self._unknown = tokenizer.backend_tokenizer, tokenizer.unk_token_id
        self._marks = {number: tokenizer.convert_ids_to_tokens(number) for number in {*marks} - {self._unknown, None}}

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """In their order. The tokenizer works on them in parallel, and adds no token of its own."""
        return [found.ids for found in self._encoder.encode_batch_fast(texts, add_special_tokens=False)]

    def refusal(self, texts: Sequence[str], tokens: Sequence[Sequence[int]]) -> str | None:
        """None for what can be used."""
        if found := sorted(self._marks.keys() & set().union(*tokens)):
            return f"holds {self._marks[found[0]]}, {TAKEN}"
        if any(text and not ids for text, ids in zip(texts, tokens, strict=True)):
            return "becomes no tokens at all: the tokenizer drops all its characters"
        return None

    def notes(self, tokens: Sequence[Sequence[int]]) -> tuple[str, ...]:
        """What the tokenizer lacks."""
        is_unknown = self._unknown is not None and any(self._unknown in ids for ids in tokens)
        return ("holds what the tokenizer does not know",) * is_unknown
