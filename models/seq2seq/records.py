"""Records: what a line, an item or a row stands for.

    pair_of(value, fields)   (prompt, response): {"prompt": ..., "response": ...}, or under other names
    text_of(value)           {"text": ...}, or a string

BadRecord says why there is none.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

from trunkline.models.text.sources import BadRecord

Kind = Literal["pairs", "text"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FIELDS = ("prompt", "response")


class Record(NamedTuple):
    """What the encoder reads, and what the decoder is to write: nothing of a text for span corruption."""

    prompt: str
    response: str = ""


def pair_of(value: Any, fields: tuple[str, str] = FIELDS) -> Record:
    """The pair that a file's value stands for. Raises BadRecord."""
    if not isinstance(value, dict):
        raise BadRecord("not an object")
    for name in fields:
        if name not in value:
            raise BadRecord(f"has no {name!r}")
    return Record(*(_text(value[name], repr(name)) for name in fields))


def text_of(value: Any) -> Record:
    """The text that a file's value stands for. Raises BadRecord."""
    if isinstance(value, dict):
        if "text" not in value:
            raise BadRecord("has no 'text'")
        value = value["text"]
    return Record(_text(value, "the text"))


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{what} is not text")
    if not value.strip():
        raise BadRecord(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which is no character
        raise BadRecord("holds a lone surrogate (\\ud800 to \\udfff), which is no character") from None
    return value
