"""Records into tokens.

Converter(tokenizer, kind)(records)   input and target of each, or why there are none
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trunkline.models.seq2seq.records import Kind, Record, texts
from trunkline.models.seq2seq.turns import between
from trunkline.models.text.conversion import Converted, Encoder
from trunkline.models.text.tokenizer import special_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Converter:
    """Refuses what becomes EOS, PAD or, in a text, any other mark. Neither side has its EOS."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, kind: Kind) -> None:
        self._eos, self._kind = int(tokenizer.eos_token_id), kind
        marks = [self._eos, tokenizer.pad_token_id, *(special_ids(tokenizer) if kind == "text" else ())]
        self._encode = Encoder(tokenizer, marks)

    def __call__(self, records: Sequence[Record]) -> list[Converted | str]:
        """In their order."""
        found = iter(self._encode([text for record in records for text in texts(record)]))
        return [self._converted(record, [next(found) for _ in texts(record)]) for record in records]

    def _converted(self, record: Record, tokens: list[list[int]]) -> Converted | str:
        if refusal := self._encode.refusal(texts(record), tokens):
            return refusal
        notes = (*record.notes, *self._encode.notes(tokens))
        if self._kind == "text":
            return Converted(tokens, notes)
        *turns, target = tokens
        return Converted((between(turns, self._eos), target), notes)
