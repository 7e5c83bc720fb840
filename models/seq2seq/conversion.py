"""Records into tokens.

Converter(tokenizer, kind)(records)   (input, target) of each, or why there are none
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from trunkline.models.seq2seq.records import Kind, Record
from trunkline.models.seq2seq.turns import between
from trunkline.models.text.tokenizer import special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Tokens(NamedTuple):
    """Without the EOS of either side; `has_unknown` says whether the tokenizer lacks something of the record."""

    source: list[int]
    target: list[int]
    has_unknown: bool


class Converter:
    """What becomes EOS, PAD or, in a text, any other mark is refused: the model would take it for the real one."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, kind: Kind) -> None:
        self._encoder, self._eos = tokenizer.backend_tokenizer, int(tokenizer.eos_token_id)
        self._unknown = tokenizer.unk_token_id
        marks = {self._eos, tokenizer.pad_token_id} | (set(special_ids(tokenizer)) if kind == "text" else set())
        self._marks = {number: tokenizer.convert_ids_to_tokens(number) for number in marks - {self._unknown}}

    def __call__(self, records: Sequence[Record]) -> list[Tokens | str]:
        """In their order. The tokenizer works on them in parallel, and adds no token of its own."""
        texts = [text for record in records for text in (*record.turns, record.response)]
        found = iter(self._encoder.encode_batch_fast(texts, add_special_tokens=False))
        return [self._converted(record, [next(found).ids for _ in (*record.turns, "")]) for record in records]

    def _converted(self, record: Record, sides: list[list[int]]) -> Tokens | str:
        ids = {number for side in sides for number in side}
        if found := sorted(ids & self._marks.keys()):
            return f"holds {self._marks[found[0]]}, which the model would take for the real one: remove it"
        *turns, target = sides
        if not all(turns) or (record.response and not target):
            return "becomes no tokens at all: the tokenizer drops all its characters"
        return Tokens(between(turns, self._eos), target, self._unknown in ids)
