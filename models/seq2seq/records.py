"""Records: what a line, an item or a row stands for.

    pair_of(value, fields)   {"prompt": ..., "response": ...}, or under other names
    prompt_of(value)         {"prompt": ...}, or a string: the turns that an answer is wanted to
    text_of(value)           {"text": ...}, or a string
    content(record)          the same for equal records
    texts(record)            all of it, turn by turn

A pair may have `history`, the turns before the prompt: messages ({"role", "content"}), or pairs of question and answer;
in a table they are written as JSON. Other fields of a record are not used; its `notes` name those that hold anything.
BadRecord says why there is no record.
"""

from __future__ import annotations

import json
from typing import Any, Literal, NamedTuple, get_args

from trunkline.models.text.fields import Fields, checked_text
from trunkline.models.text.sources import BadRecord

Kind = Literal["pairs", "text"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FIELDS = ("prompt", "response")
HISTORY = "history"

_ROLES = ("user", "assistant", "system", "developer", "tool")


class Record(NamedTuple):
    """What the encoder reads, and what the decoder is to write: nothing of a text for span corruption.

    history: the turns before the prompt, the oldest first
    notes: what of the record is not used
    """

    prompt: str
    response: str = ""
    history: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def turns(self) -> tuple[str, ...]:
        """What the encoder reads, turn by turn."""
        return *self.history, self.prompt


def pair_of(value: Any, fields: tuple[str, str] = FIELDS) -> Record:
    """The pair that a file's value stands for. Raises BadRecord."""
    held = Fields(value)
    for name in fields:
        if name not in held:
            raise BadRecord(f"has no {name!r}: mend it, or say by --fields what the two fields are called")
    prompt, response = (checked_text(held[name], repr(name)) for name in fields)
    history = _history(held.get(HISTORY)) if HISTORY not in fields else ()
    return Record(prompt, response, history, held.notes())


def prompt_of(value: Any) -> tuple[str, ...]:
    """The turns of a talk whose next is wanted: `history`, then "prompt". Raises BadRecord."""
    if isinstance(value, str):
        return (checked_text(value, "the prompt"),)
    held = Fields(value)
    return *_history(held.get(HISTORY)), checked_text(held[FIELDS[0]], repr(FIELDS[0]))


def text_of(value: Any) -> Record:
    """The text that a file's value stands for. Raises BadRecord."""
    if isinstance(value, str):
        return Record(checked_text(value, "the text"))
    held = Fields(value)
    return Record(checked_text(held["text"], "the text"), notes=held.notes())


def content(record: Record) -> str:
    """What of a record decides whether it is trained on: its texts."""
    return json.dumps([*record.turns, record.response])


def texts(record: Record) -> list[str]:
    """What of a record becomes tokens: the turns, and the response if there is one."""
    return [text for text in (*record.turns, record.response) if text]


def _history(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):  # as tables hold them
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            raise BadRecord(f"{HISTORY!r} is text that is not JSON") from None
    if not value:
        return ()
    if isinstance(value, list) and all(isinstance(turn, dict) and isinstance(turn.get("role"), str) for turn in value):
        if unknown := [turn["role"] for turn in value if turn["role"] not in _ROLES]:
            raise BadRecord(f"{HISTORY!r} has a turn of the role {unknown[0][:40]!r}: use {', '.join(_ROLES)}")
        turns = [turn.get("content") for turn in value]
    elif isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        turns = [side for pair in value for side in pair]
    else:
        raise BadRecord(f"{HISTORY!r} is neither a list of messages nor of pairs of question and answer")
    return tuple(checked_text(turn, f"a turn of {HISTORY!r}") for turn in turns)
