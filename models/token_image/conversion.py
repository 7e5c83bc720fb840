"""Records into tokens.

Converter(tokenizer, kind, template)(records)   text, of dialogues also condition, of each, or why there are none
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trunkline.engine.errors import ConfigError
from trunkline.models.text.chat_template import Asked, Message, TemplateLimit, render
from trunkline.models.text.conversion import TAKEN, Converted, Encoder
from trunkline.models.text.sources import BadRecord
from trunkline.models.text.tokenizer import special_ids, special_tokens
from trunkline.models.token_image.records import Kind, Record, texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Converter:
    """Of kind "texts", a prompt and its answer are one text: the chat template writes it, or a line break joins them.

    What becomes EOS or another mark is refused, unless the template wrote it.

    template: what the tokenizer's chat template is called in an error; None where it is not to be used
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, kind: Kind, template: str | None = None) -> None:
        self._tokenizer, self._kind, self._template = tokenizer, kind, template
        self._eos: int = tokenizer.eos_token_id
        self._encode = Encoder(tokenizer, {self._eos, tokenizer.pad_token_id, *special_ids(tokenizer)})
        self._mark = re.compile("|".join(map(re.escape, special_tokens(tokenizer))))
        self._drops_nul = not self._encode(["\0"])[0]

    def __call__(self, records: Sequence[Record]) -> list[Converted | str]:
        """In their order. Raises ConfigError for a chat template that has to be stopped."""
        worded = self._worded(records)
        found = iter(self._encode([text for said in worded if not isinstance(said, BadRecord) for text in said]))
        return [
            str(said) if isinstance(said, BadRecord) else self._converted(record, said, [next(found) for _ in said])
            for record, said in zip(records, worded, strict=True)
        ]

    def _converted(self, record: Record, said: list[str], tokens: list[list[int]]) -> Converted | str:
        if self._drops_nul and any("\0" in text for text in said):
            return "holds a NUL character, which the tokenizer has no token for: remove it"
        notes = (*record.notes, *self._encode.notes(tokens))
        if self._kind == "dialogues" and record.prompt is None:
            notes += ("has no prompt, so that its condition is empty",)
        if not self._is_rendered(record):
            return self._encode.refusal(said, tokens) or Converted(tokens, notes)
        (ids,) = tokens
        if ids[-1:] == [self._eos]:  # every text gets its own
            ids.pop()
        if self._eos in ids:
            notes += ("the chat template writes EOS within the text, and a sampled text ends at its first EOS",)
        return Converted([ids], notes) if ids else "becomes no tokens at all: the chat template leaves nothing of it"

    def _worded(self, records: Sequence[Record]) -> list[list[str] | BadRecord]:
        """The texts that become tokens, one for each column."""
        if self._kind == "dialogues":
            return [[record.text, record.prompt or ""] for record in records]
        rendered = iter(self._rendered([record for record in records if self._is_rendered(record)]))
        return [next(rendered) if self._is_rendered(record) else ["\n".join(texts(record))] for record in records]

    def _is_rendered(self, record: Record) -> bool:
        return self._template is not None and record.prompt is not None

    def _rendered(self, pairs: Sequence[Record]) -> list[list[str] | BadRecord]:
        talks: list[list[Message]] = [
            [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": pair.text}] for pair in pairs
        ]
        try:
            found = render(self._tokenizer, [], [Asked(others=talk) for talk in talks]) if talks else []
        except TemplateLimit as limit:
            raise ConfigError(f"{self._template} {limit}: mend it, or leave out --use-chat-template") from limit
        marks = [self._mark.search("\n".join(texts(pair))) for pair in pairs]
        return [
            BadRecord(f"holds {mark[0]}, {TAKEN}") if mark else text if isinstance(text, BadRecord) else [text]
            for text, mark in zip(found, marks, strict=True)
        ]
