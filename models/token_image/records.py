"""Records: what a line, an item or a row stands for.

    record_of(value)   {"text": ...}, {"prompt": ..., "answer": ...} or a string
    content(record)    the same for equal records
    texts(record)      all of it

"response" stands for "answer", too. Other fields of a record are not used; its `notes` name those that hold anything.
BadRecord says why there is no record.
"""

from __future__ import annotations

import json
from typing import Any, Literal, NamedTuple, get_args

from trunkline.models.text.fields import Fields, checked_text
from trunkline.models.text.sources import BadRecord

Kind = Literal["texts", "dialogues"]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Record(NamedTuple):
    """A text, or an answer with its prompt.

    notes: what of the record is not used
    """

    text: str
    prompt: str | None = None
    notes: tuple[str, ...] = ()


def record_of(value: Any) -> Record:
    """The record that a file's value stands for. Raises BadRecord."""
    if isinstance(value, str):
        return Record(checked_text(value, "the text"))
    held = Fields(value)
    if "text" in held:
        return Record(checked_text(held["text"], "'text'"), notes=held.notes())
    answer = "answer" if "answer" in held else "response"
    if "prompt" not in held or answer not in held:
        raise BadRecord("has neither 'text' nor both 'prompt' and 'answer'")
    prompt, text = (checked_text(held[name], repr(name)) for name in ("prompt", answer))
    return Record(text, prompt, held.notes())


def content(record: Record) -> str:
    """What of a record decides whether it is trained on."""
    return json.dumps([record.prompt, record.text])


def texts(record: Record) -> list[str]:
    """What of a record becomes tokens."""
    return [record.text] if record.prompt is None else [record.prompt, record.text]
