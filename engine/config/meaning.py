"""What a section of a configuration means, however it is spelt.

    FolderPath            a field that is a path: absolute from the moment it is read, in every working directory
    HOW                   marks a field, as Annotated[..., HOW], that says how something is computed and not what
    meaning_of(section)   a section's values, equal for sections that mean the same run

A section may have a method `in_full()`, which returns it without abbreviations, such as a preset by its widths.
"""

from __future__ import annotations

import os
import typing
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field

HOW = "says how, not what"
_PATH = "is a path"


def _absolute(value: str) -> str:
    if not value or "\0" in value:
        raise ValueError("give the path of a folder")
    try:
        return str(Path(value).absolute())  # without a look at links, which may come to lead elsewhere
    except OSError as error:
        raise ValueError(f"give an absolute path: the working directory cannot be told ({error.strerror})") from error


FolderPath = Annotated[str, AfterValidator(_absolute), _PATH, Field(json_schema_extra={"format": "path"})]


def meaning_of(section: BaseModel) -> dict[str, Any]:
    """The values of a section, ready for JSON: paths without links, and without the fields that say how."""
    section = getattr(section, "in_full", lambda: section)()
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        marks = _marks([field.annotation, *field.metadata])
        if HOW in marks:
            del values[name]
        elif isinstance(value, BaseModel):
            values[name] = meaning_of(value)
        elif _PATH in marks and value is not None:
            values[name] = os.path.realpath(value)
    return values


def _marks(annotations: typing.Iterable[Any]) -> set[str]:
    """The marks in annotations, at any depth: those of `FolderPath | None` stand in its branches."""
    found = set()
    for annotation in annotations:
        if typing.get_origin(annotation) is not typing.Literal:
            found |= _marks(typing.get_args(annotation))
        if annotation is HOW or annotation is _PATH:
            found.add(annotation)
    return found
