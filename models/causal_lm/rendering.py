"""Records as token ids, with a mark on those that are to be learned.

    Renderer(tokenizer).render(record)   one sequence for a text or a conversation; chosen and rejected for a preference

A text is its tokens and EOS, all of it learned. Of a conversation the assistant's turns are learned, each with the
token that ends it, and nothing else; of a preference what the assistant says after the prompt.

Without a chat template a prompt and its response are tokenized apart and joined, and EOS ends them. With one, the whole
conversation is rendered as text and tokenized once, as it will be at generation. Where an answer stands in that text is
found by rendering what comes before it, with the template's generation prompt, and what comes up to its end: both must
be how the whole begins. A template that is no such thing must mark answers with {% generation %}.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from models.causal_lm.sources import BadRecord, Conversation, Message, Preference, Record, Text
from models.causal_lm.tokenizer import leading_ids, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_GENERATION = re.compile(r"\{%-?\s*generation\b")


class Rendered(NamedTuple):
    """ids: int64 [n]. learned: bool [n], the tokens that carry loss (those to be predicted; nothing is shifted)."""

    ids: np.ndarray
    learned: np.ndarray


class Renderer:
    """Renders records with a tokenizer that `models.causal_lm.tokenizer` loaded or trained."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._encoder = tokenizer.backend_tokenizer
        self._leading = leading_ids(tokenizer)
        self._eos = tokenizer.eos_token_id
        self._stops = stop_ids(tokenizer)
        # the longest first, so that the whole of a mark is found
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._marks = tuple(sorted({*tokenizer.all_special_tokens, *added}, key=len, reverse=True))

    def render(self, record: Record) -> list[Rendered]:
        """Sequences of the record: one, or for a preference two that begin with the same prompt. Raises BadRecord."""
        if isinstance(record, Text):
            ids = np.array([*self._leading, *self._encode(record.text), self._eos], np.int64)
            return [Rendered(ids, np.ones(len(ids), bool))]
        if isinstance(record, Conversation):
            return [self._conversation(record.messages, 0)]
        return self._preference(record)

    def _encode(self, text: str) -> list[int]:
        return self._encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _preference(self, record: Preference) -> list[Rendered]:
        first = len(record.prompt)
        return [self._conversation(record.prompt + side, first) for side in (record.chosen, record.rejected)]

    def _conversation(self, messages: Sequence[Message], first: int) -> Rendered:
        """`messages`, of which the assistant's from number `first` on are learned."""
        for mark in self._marks:
            if any(mark in message["content"] for message in messages):
                raise BadRecord(f"a message holds {mark}, which the model would take for the real one: remove it")
        if self._tokenizer.chat_template is None:
            return self._plain(messages)
        whole = self._apply(messages)
        answers = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
        spans = [self._span(messages, i, whole) for i in answers]
        if all(span is not None for span in spans):
            rendered = self._by_spans(whole, [span for span in spans if span is not None])
        elif self._has_generation_marks():
            rendered = self._by_marks(messages, first)
        else:
            raise BadRecord(
                "the chat template writes first turns alone unlike those of the whole conversation, and marks no "
                "answer with {% generation %}: give a template that does, by --chat-template"
            )
        if not rendered.learned.any():
            raise BadRecord("the chat template leaves nothing of the answer")
        if messages[-1]["role"] == "assistant" and not self._ends(rendered):
            rendered = Rendered(np.append(rendered.ids, self._eos), np.append(rendered.learned, True))
        return rendered

    def _plain(self, messages: Sequence[Message]) -> Rendered:
        if [message["role"] for message in messages] != ["user", "assistant"]:
            raise BadRecord(
                "more than a prompt and a response, but the tokenizer has no chat template: give one by --chat-template"
            )
        prompt = [*self._leading, *self._encode(messages[0]["content"])]
        response = [*self._encode(messages[1]["content"]), self._eos]
        learned = np.arange(len(prompt) + len(response)) >= len(prompt)
        return Rendered(np.array(prompt + response, np.int64), learned)

    def _apply(self, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        try:
            text: Any = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=generation_prompt
            )
            return text
        except Exception as error:  # a template raises what it likes
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadRecord(f"the chat template fails: {reason}") from error

    def _span(self, messages: Sequence[Message], answer: int, whole: str) -> tuple[int, int] | None:
        """First and last + 1 character of an answer with what ends it; None if the template does not tell."""
        try:
            before = self._apply(messages[:answer], generation_prompt=True)
            upto = whole if answer + 1 == len(messages) else self._apply(messages[: answer + 1])
        except BadRecord:  # a template may refuse a part of what it takes as a whole
            return None
        if not whole.startswith(upto):
            upto = upto.removesuffix(self._tokenizer.eos_token)  # which some templates write once, after all turns
        if not (whole.startswith(before) and whole.startswith(upto) and len(before) < len(upto)):
            return None
        if messages[answer]["content"].split()[-1] not in upto[len(before) :]:
            raise BadRecord("the chat template leaves out what the assistant says: it may want content of another form")
        # the line break after the mark that ends a turn is the template's; generation has stopped by then
        end = len(upto.rstrip()) if upto.rstrip().endswith(self._marks) else len(upto)
        return len(before), end

    def _by_spans(self, whole: str, spans: Sequence[tuple[int, int]]) -> Rendered:
        encoding = self._encoder.encode(whole, add_special_tokens=False)
        starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        learned = np.zeros(len(starts), bool)
        for start, end in spans:
            if ((starts < start) & (start < ends)).any():
                raise BadRecord(
                    "the answer begins inside a token: let the chat template's generation prompt not end in a space"
                )
            learned |= (start <= starts) & (starts < end)
        return Rendered(np.array(encoding.ids, np.int64), learned)

    def _has_generation_marks(self) -> bool:
        template: Any = self._tokenizer.chat_template
        return isinstance(template, str) and _GENERATION.search(template) is not None

    def _by_marks(self, messages: Sequence[Message], first: int) -> Rendered:
        try:
            found: Any = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], return_dict=True, return_assistant_tokens_mask=True
            )
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadRecord(f"the chat template fails: {reason}") from error
        ids = np.array(found["input_ids"], np.int64)
        learned = np.array(found["assistant_masks"], np.int64) == 1
        # earlier answers of the prompt stand first; the marked runs come in the messages' order
        runs = np.cumsum(learned & ~np.concatenate([[False], learned[:-1]]))
        learned &= runs > sum(message["role"] == "assistant" for message in messages[:first])
        ends = np.concatenate([[False], learned[:-1]]) & ~learned & np.isin(ids, self._stops)
        return Rendered(ids, learned | ends)

    def _ends(self, rendered: Rendered) -> bool:
        """Whether the last answer ends with a token at which generation stops, but for a line break of the template."""
        ids, learned = rendered
        start = np.flatnonzero(learned & ~np.concatenate([[False], learned[:-1]]))[-1]
        return bool(np.isin(ids[start:][learned[start:]][-3:], self._stops).any())
