"""Records as token ids, with a mark on those that are to be learned.

    Renderer(tokenizer).render(record)     one sequence of a text or a conversation; chosen and rejected of a preference
    Renderer(tokenizer).prompt(messages)   what a model that learned from these continues

A text is its tokens and EOS, all of it learned. Of a conversation the assistant's turns are learned, each with the
token that ends it, and nothing else; of a preference what the assistant says after the prompt. A turn of weight 0 is
not learned.

Without a chat template a prompt and its response are tokenized apart and joined, and EOS ends them. With one, the whole
conversation is rendered as text and tokenized once, as it will be at generation. Where an answer stands in that text is
found by rendering what comes before it, with the template's generation prompt, and what comes up to its end: both must
be how the whole begins. A template that is no such thing must mark answers with {% generation %}.

An answer ends with a special token at which generation stops: one that the template writes after it, or the one that
the next turn begins with. Where there is neither, EOS is put after the answer, here and in the prompts of generation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trunkline.models.causal_lm.records import Conversation, Message, Preference, Record, Text, strings
from trunkline.models.causal_lm.tokenizer import turn_ends
from trunkline.models.causal_lm.unrendered import Unrendered, without_template
from trunkline.models.text.chat_template import Asked, TemplateLimit, render, render_marked
from trunkline.models.text.sources import BadRecord
from trunkline.models.text.tokenizer import leading_ids, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_GENERATION = re.compile(r"\{%-?\s*generation\b")
_TRIES = 3
_PUT_EOS = "EOS is put after an answer, because the chat template ends it with no special token"

Note = Callable[[str], None]
Span = tuple[int, int]
"""First and last + 1 character."""


class Rendered(NamedTuple):
    """ids: int64 [n]. learned: bool [n], the tokens that carry loss (those to be predicted; nothing is shifted)."""

    ids: np.ndarray
    learned: np.ndarray


class _Answer(NamedTuple):
    """A turn of the assistant: characters `start` ... `end` - 1 of the text.

    is_ended: whether there is anything, in it or after it, at which generation stops
    """

    start: int
    end: int
    is_learned: bool
    is_ended: bool


def _nothing(_: str) -> None:
    """To whom what is noted does not matter."""


class Renderer:
    """Renders records with a tokenizer that `trunkline.models.causal_lm.tokenizer` loaded or trained.

    template: what its chat template is called in an error
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str = "the chat template") -> None:
        self._tokenizer, self._template = tokenizer, template
        self._encoder = tokenizer.backend_tokenizer
        self._leading = leading_ids(tokenizer)
        self._eos, self._eos_id = str(tokenizer.eos_token), tokenizer.eos_token_id
        self._marks = tuple(special_tokens(tokenizer))
        self._mark = re.compile("|".join(map(re.escape, self._marks)))
        self._ends = tuple(dict.fromkeys([*turn_ends(tokenizer), self._eos]))
        self._stopped: list[str] = []  # why the template was, at each of the latest records

    def render(self, record: Record, note: Note = _nothing) -> list[Rendered]:
        """Sequences of the record: one, or for a preference two that begin with the same prompt. Raises BadRecord.

        note: called with what of the record does not reach its sequences, and with what is in them beside
        """
        if isinstance(record, Text):
            ids = np.array([*self._leading, *self._encode(record.text), self._eos_id], np.int64)
            return [Rendered(ids, np.ones(len(ids), bool))]
        if isinstance(record, Conversation):
            return [self._conversation(record.messages, 0, record.tools, note)]
        return self._preference(record, note)

    def prompt(self, messages: Sequence[Message], note: Note = _nothing) -> list[int]:
        """Token ids of a conversation up to where the assistant begins to speak. Raises BadRecord."""
        whole, spans = self._spans(messages, (), note, generation_prompt=True)
        answers = [self._answer(whole, span, messages[i]["content"], False) for i, span in spans.items() if span]
        return self._encode(self._with_eos(whole, answers, note)[0])

    def _encode(self, text: str) -> list[int]:
        return self._encoder.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _preference(self, record: Preference, note: Note) -> list[Rendered]:
        first = len(record.prompt)
        chosen, rejected = (
            self._conversation(record.prompt + side, first, record.tools, note)
            for side in (record.chosen, record.rejected)
        )
        if np.array_equal(chosen.ids, rejected.ids):
            raise BadRecord("'chosen' and 'rejected' become the same tokens")
        return [chosen, rejected]

    def _conversation(self, messages: Sequence[Message], first: int, tools: Sequence[Any], note: Note) -> Rendered:
        """`messages`, of which the assistant's from number `first` on are learned, but for those of weight 0."""
        for text in strings([*messages, *tools]):
            if mark := self._mark.search(text):
                raise BadRecord(f"a message holds {mark[0]}, which the model would take for the real one: remove it")
        roles = [message["role"] for message in messages]
        learned = [i for i in range(first, len(roles)) if roles[i] == "assistant" and messages[i].get("weight", 1)]
        messages = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
        if self._tokenizer.chat_template is None:
            return self._plain(messages, tools, note)
        whole, spans = self._spans(messages, tools, note)
        by_marks = not all(spans[i] for i in learned)
        if by_marks:
            answers = self._marked_answers(messages, tools, learned)
        else:
            answers = [
                self._answer(whole, span, messages[i]["content"], i in learned) for i, span in spans.items() if span
            ]
        # the last of `answers` is the last turn only if that turn was found
        closes = roles[-1] == "assistant" and (by_marks or spans[len(roles) - 1] is not None)
        text, answers = self._with_eos(whole, answers, note, but_last=closes)
        rendered = self._tokenized(text, [answer for answer in answers if answer.is_learned], by_marks)
        if not rendered.learned.any():
            raise BadRecord("the chat template leaves nothing of the answer")
        if closes and answers[-1].is_learned and not answers[-1].is_ended:
            rendered = Rendered(np.append(rendered.ids, self._eos_id), np.append(rendered.learned, True))
        return rendered

    def _plain(self, messages: Sequence[Message], tools: Sequence[Any], note: Note) -> Rendered:
        if [message["role"] for message in messages] != ["user", "assistant"]:
            raise BadRecord(
                "more than a prompt and a response, but the tokenizer has no chat template: give one by --chat-template"
            )
        without_template(messages, tools, note)
        prompt = [*self._leading, *self._encode(messages[0]["content"])]
        response = [*self._encode(messages[1]["content"]), self._eos_id]
        learned = np.arange(len(prompt) + len(response)) >= len(prompt)
        return Rendered(np.array(prompt + response, np.int64), learned)

    def _spans(
        self, messages: Sequence[Message], tools: Sequence[Any], note: Note, generation_prompt: bool = False
    ) -> tuple[str, dict[int, Span | None]]:
        """The text, and where the turns of the assistant stand in it; None where the template does not tell."""
        unrendered = Unrendered(messages, tools, generation_prompt)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        asked = [Asked(generation_prompt=generation_prompt)]
        asked += [item for i in answers for item in (Asked(i, True), Asked(i + 1))]
        if len(self._stopped) == _TRIES:
            raise BadRecord(self._stopped[-1])
        try:
            texts = render(self._tokenizer, messages, asked + unrendered.asked, tools)
        except TemplateLimit as limit:
            self._stopped.append(f"{self._template} {limit} for one record: mend the template, or split the record")
            raise BadRecord(self._stopped[-1]) from limit
        self._stopped.clear()
        whole, *parts = texts
        if isinstance(whole, BadRecord):
            raise whole
        unrendered.report(whole, parts[2 * len(answers) :], note)
        return whole, {i: self._span(whole, *parts[2 * k : 2 * k + 2]) for k, i in enumerate(answers)}

    def _span(self, whole: str, before: str | BadRecord, upto: str | BadRecord) -> Span | None:
        if isinstance(before, BadRecord) or isinstance(upto, BadRecord):  # parts of what it takes as a whole
            return None
        if not whole.startswith(upto):
            upto = upto.removesuffix(self._eos)  # which some templates write once, after all turns
        if not (whole.startswith(before) and whole.startswith(upto) and len(before) < len(upto)):
            return None
        return len(before), len(upto)

    def _answer(self, whole: str, span: Span, content: str, is_learned: bool) -> _Answer:
        start, end = span
        turn, last_word = whole[start:end], "".join(content.split()[-1:])  # a model may say nothing
        said = self._mark.sub(lambda mark: "\0" * len(mark[0]), turn).rfind(last_word) if last_word else 0
        if is_learned and said < 0:  # it may be within a mark, which is not said
            raise BadRecord("the chat template leaves out what the assistant says: it may want content of another form")
        # the line break after the mark that ends a turn is the template's; generation has stopped by then
        if turn.rstrip().endswith(self._marks):
            end = start + len(turn.rstrip())
        after = whole[start + said + len(last_word) : end]
        # within a conversation a mark of another kind may end a turn, such as one that asks for a tool
        goes_on = bool(whole[end:].strip())
        is_ended = any(mark in after for mark in self._ends) or (goes_on and after.endswith(self._marks))
        return self._with_next_mark(whole, _Answer(start, end, is_learned, is_ended))

    def _with_next_mark(self, whole: str, answer: _Answer) -> _Answer:
        """Where nothing ends the turn: with the mark that the next one begins with, if generation stops there."""
        head = whole[answer.end :].lstrip()
        mark = next((mark for mark in self._ends if head.startswith(mark)), None)
        if answer.is_ended or mark is None:
            return answer
        return answer._replace(end=len(whole) - len(head) + len(mark), is_ended=True)

    def _marked_answers(
        self, messages: Sequence[Message], tools: Sequence[Any], learned: Sequence[int]
    ) -> list[_Answer]:
        """The parts that the template marks, one for each turn of the assistant unless all of them are learned."""
        template: Any = self._tokenizer.chat_template
        if not isinstance(template, str) or _GENERATION.search(template) is None:
            raise BadRecord(
                "the chat template writes first turns alone unlike those of the whole conversation, and marks no "
                "answer with {% generation %}: give a template that does, by --chat-template"
            )
        whole, spans = render_marked(self._tokenizer, messages, tools)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(spans) != len(turns) and len(learned) != len(turns):
            raise BadRecord(
                "the chat template does not mark one part of each answer with {% generation %}, so that it does not "
                "tell which of them is not to be learned"
            )
        answers = []
        for k, (start, end) in enumerate(spans):
            is_learned = start < end and (len(spans) != len(turns) or turns[k] in learned)
            is_ended = any(mark in whole[start:end] for mark in self._ends)
            answer = self._with_next_mark(whole, _Answer(start, end, is_learned, is_ended))
            # what stands unmarked before the next part may end the turn, and that part may belong to the same turn
            follows = k + 1 < len(spans)
            if follows and (len(spans) != len(turns) or self._mark.search(whole, end, spans[k + 1][0])):
                answer = answer._replace(is_ended=True)
            answers.append(answer)
        return answers

    def _with_eos(
        self, whole: str, answers: Sequence[_Answer], note: Note, but_last: bool = False
    ) -> tuple[str, list[_Answer]]:
        """The text with EOS after each answer that nothing ends, and where the answers stand in it."""
        pieces, moved, begin, added = [], [], 0, 0
        for number, (start, end, is_learned, is_ended) in enumerate(answers):
            put = "" if is_ended or (but_last and number == len(answers) - 1) else self._eos
            pieces += [whole[begin:end], put]
            moved.append(_Answer(start + added, end + added + len(put), is_learned, is_ended))
            begin, added = end, added + len(put)
        if added:
            note(_PUT_EOS)
        return "".join([*pieces, whole[begin:]]), moved

    def _tokenized(self, text: str, answers: Sequence[_Answer], may_begin_inside: bool) -> Rendered:
        encoding = self._encoder.encode(text, add_special_tokens=False)
        starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        learned = np.zeros(len(starts), bool)
        for answer in answers:
            inside = (starts < answer.start) & (answer.start < ends)
            if inside.any() and not may_begin_inside:
                raise BadRecord(
                    "the answer begins inside a token: let the chat template's generation prompt not end in a space"
                )
            learned |= inside | ((answer.start <= starts) & (starts < answer.end))
        return Rendered(np.array(encoding.ids, np.int64), learned)
