"""The fields of a record, checked.

    Fields(value)                .notes() names those that hold anything and were not read
    checked_text(value, what)    a text that says something
    check_encodable(text)        that it is one

They raise BadRecord.
"""

from __future__ import annotations

from typing import Any

from trunkline.models.text.sources import BadRecord

LONGEST_NAME = 40
"""Characters of a name that are shown."""


class Fields(dict[str, Any]):
    """A record's fields, which know whether they were read."""

    def __init__(self, record: Any) -> None:
        if not isinstance(record, dict):
            raise BadRecord("not an object")
        super().__init__(record)
        self.used: set[str] = set()
        self.said: list[str] = []

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise BadRecord(f"has no '{name}'")
        self.used.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.used.add(name)
        return super().get(name, default)

    def notes(self) -> tuple[str, ...]:
        """What was said of the record, and which fields that hold anything were not read."""
        unused = [name for name, value in self.items() if name not in self.used and value not in (None, "", [], {})]
        return tuple(
            dict.fromkeys([*(f"the field {name[:LONGEST_NAME]!r} is not used" for name in unused), *self.said])
        )


def checked_text(value: Any, what: str) -> str:
    """The value, if it is a text that is not empty. `what` it is called in a message."""
    if not isinstance(value, str):
        raise BadRecord(f"{what} is not text")
    if not value.strip():
        raise BadRecord(f"{what} is empty")
    check_encodable(value)
    return value


def check_encodable(text: str) -> None:
    """Raises BadRecord for a text that no file could hold."""
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which is no character
        raise BadRecord("holds a lone surrogate (\\ud800 to \\udfff), which is no character") from None
