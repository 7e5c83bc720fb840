"""Records from the files that people have: JSONL, JSON, Parquet and plain text.

    find_files(paths)            the files to read, in the order in which they are read
    read_records(files, kind)    (place, record) for a good record, Problem(place, reason) for any other

Three kinds of record, each in the fields that data sets use:

    text            {"text": ...}, a JSON string, or a .txt file, which is one document
    conversations   {"messages": [{"role", "content"}, ...]}, {"prompt", "response"} or {"input", "output"}
    preferences     {"prompt", "chosen", "rejected"} as text or as messages, as TRL has them; without "prompt", `chosen`
                    and `rejected` are whole conversations, and the prompt is what they begin with in common

JSONL and Parquet are read piece by piece, so memory does not depend on their size. A bad record is never dropped
silently and never stops the others; a file that cannot be read at all is an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import polars as pl

from engine.errors import ConfigError, DataError

Kind = Literal["text", "conversations", "preferences"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Message = Mapping[str, Any]
"""{"role": str, "content": str} and whatever else the chat template may want of it."""

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
MAX_RECORD_BYTES = 16 << 20
MAX_JSON_BYTES = 1 << 30
_PARQUET_ROWS = 1024


@dataclass(frozen=True)
class Place:
    """Where a record stands: line `number` of a JSONL file, item or row `number` of others, from 1."""

    path: Path
    number: int | None = None
    unit: str = "line"

    def __str__(self) -> str:
        return f"{self.path}" if self.number is None else f"{self.path}: {self.unit} {self.number}"


@dataclass(frozen=True)
class Problem:
    """A record that cannot be used. `reason` holds nothing of the record, so equal problems have equal reasons."""

    place: Place
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


class BadRecord(Exception):  # noqa: N818 - not an error of the program; it becomes a Problem
    """Why a record cannot be used."""


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Conversation:
    """Messages, the answers that are to be learned among them."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Preference:
    """`chosen` and `rejected` each continue `prompt`, and each begins with the assistant."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]


Record = Text | Conversation | Preference


def find_files(paths: Sequence[Path]) -> list[Path]:
    """The files at `paths`; a folder gives those in it and below it that end in one of SUFFIXES, sorted.

    Names that begin with a dot are passed over. Raises ConfigError for a path that is not there, for a file that ends
    in nothing known, and for a folder without any file to read.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += _files_below(path)
        elif not path.exists():
            raise ConfigError(f"{path}: no such file or folder: check the path")
        elif path.suffix.lower() not in SUFFIXES:
            raise ConfigError(f"{path}: cannot be read: convert it to one of {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    return list(dict.fromkeys(files))


def _files_below(folder: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    files = sorted(path for path in found if path.suffix.lower() in SUFFIXES)
    if not files:
        held = f"its {len(found)} files end in none of" if found else "an empty folder; put files there that end in"
        raise ConfigError(f"{folder}: no file to read: {held} {', '.join(SUFFIXES)}")
    return files


def read_records(files: Sequence[Path], kind: Kind) -> Iterator[tuple[Place, Record] | Problem]:
    """Every record of `files` in order, or what is wrong with it. Raises DataError for a file that is damaged whole."""
    for path in files:
        try:
            for place, raw in _READERS[path.suffix.lower()](path):
                try:
                    yield place, _record(raw() if callable(raw) else raw, kind)
                except BadRecord as bad:
                    yield Problem(place, str(bad))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}): check the file") from error


def _lines(path: Path) -> Iterator[tuple[Place, Any]]:
    number = 0
    with path.open("rb") as file:
        while line := file.readline(MAX_RECORD_BYTES + 1):
            number += 1
            place = Place(path, number)
            if len(line) > MAX_RECORD_BYTES:
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_RECORD_BYTES)
                yield place, _too_long
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():  # an empty line holds no record
                yield place, lambda line=line: _decoded(line)
    if number == 0:
        yield Place(path), _empty_file


def _json_items(path: Path) -> Iterator[tuple[Place, Any]]:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise DataError(f"{path}: larger than {MAX_JSON_BYTES >> 30} GiB: convert it to JSONL, one object a line")
    data = path.read_bytes()
    if not data.strip():
        yield Place(path), _empty_file
        return
    try:
        items = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start + 1}): save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}): mend it, or write one object a line as .jsonl") from error
    if not isinstance(items, list):
        raise DataError(f"{path}: holds no list: use [{{...}}, ...], or one object a line as .jsonl")
    for index, item in enumerate(items):
        yield Place(path, index + 1, "item"), item


def _parquet_rows(path: Path) -> Iterator[tuple[Place, Any]]:
    number = 0
    try:
        for batch in pl.scan_parquet(path, glob=False).collect_batches(chunk_size=_PARQUET_ROWS):
            for row in batch.iter_rows(named=True):
                number += 1
                yield Place(path, number, "row"), _without_nulls(row)
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path}: not a whole Parquet file ({error}): write it again") from error
    if number == 0:
        yield Place(path), _empty_file


def _without_nulls(value: Any) -> Any:
    """Fields that a row lacks are null in Parquet, where all rows have the same fields."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _text_file(path: Path) -> Iterator[tuple[Place, Any]]:
    with path.open("rb") as file:
        data = file.read(MAX_RECORD_BYTES + 1)
    if len(data) > MAX_RECORD_BYTES:
        yield Place(path), _too_long
    elif not data:
        yield Place(path), _empty_file
    else:
        yield Place(path), lambda: _utf8(data)


_READERS = {".jsonl": _lines, ".json": _json_items, ".parquet": _parquet_rows, ".txt": _text_file}


def _too_long() -> Any:
    raise BadRecord(f"longer than {MAX_RECORD_BYTES >> 20} MiB: split it")


def _empty_file() -> Any:
    raise BadRecord("the file is empty")


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadRecord("not UTF-8") from None


def _decoded(line: bytes) -> Any:
    text = _utf8(line)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRecord("not JSON") from None


def _record(value: Any, kind: Kind) -> Record:
    """The record that a file's value stands for. Raises BadRecord."""
    if kind == "text":
        return Text(_checked_text(value if isinstance(value, str) else _field(_object(value), "text"), "the text"))
    fields = _object(value)
    if fields.get("tools"):
        raise BadRecord("has 'tools', which cannot be rendered here")
    return _conversation(fields) if kind == "conversations" else _preference(fields)


def _conversation(fields: Mapping[str, Any]) -> Conversation:
    if "messages" in fields:
        messages = _messages(fields["messages"], "'messages'")
        if not any(message["role"] == "assistant" for message in messages):
            raise BadRecord("'messages' has no turn of the assistant")
        if messages[0]["role"] == "assistant":
            raise BadRecord("'messages' begins with the assistant, so that there is nothing to answer")
        return Conversation(messages)
    if "instruction" in fields:
        raise BadRecord("has 'instruction', which is not read: join it with 'input' into one field")
    for question, answer in (("prompt", "response"), ("input", "output")):
        if question in fields or answer in fields:
            prompt = _checked_text(_field(fields, question), f"'{question}'")
            return Conversation(_exchange(prompt, _checked_text(_field(fields, answer), f"'{answer}'")))
    raise BadRecord("has neither 'messages' nor 'prompt' and 'response' nor 'input' and 'output'")


def _preference(fields: Mapping[str, Any]) -> Preference:
    sides = [_field(fields, name) for name in ("chosen", "rejected")]
    prompt = fields.get("prompt")
    if all(isinstance(side, str) for side in sides):
        question, *answers = _exchange(_checked_text(_field(fields, "prompt"), "'prompt'"), *sides)
        for name, side in zip(("chosen", "rejected"), sides):
            _checked_text(side, f"'{name}'")
        found = Preference((question,), (answers[0],), (answers[1],))
    elif all(isinstance(side, list) for side in sides):
        chosen, rejected = _messages(sides[0], "'chosen'"), _messages(sides[1], "'rejected'")
        if isinstance(prompt, list):
            found = Preference(_messages(prompt, "'prompt'"), chosen, rejected)
        elif prompt is not None and chosen[0]["role"] == rejected[0]["role"] == "assistant":
            found = Preference(_exchange(_checked_text(prompt, "'prompt'")), chosen, rejected)
        else:
            same = [a == b for a, b in zip(chosen, rejected)]
            common = same.index(False) if False in same else len(same)
            found = Preference(chosen[:common], chosen[common:], rejected[common:])
    else:
        raise BadRecord("'chosen' and 'rejected' are not both text or both lists of messages")
    if found.chosen == found.rejected:
        raise BadRecord("'chosen' and 'rejected' are the same")
    if not found.prompt:
        raise BadRecord("'chosen' and 'rejected' begin with nothing in common, and there is no 'prompt'")
    for name, side in (("chosen", found.chosen), ("rejected", found.rejected)):
        if not side or side[0]["role"] != "assistant":
            raise BadRecord(f"'{name}' does not go on with a turn of the assistant after the prompt")
    return found


def _exchange(question: str, *answers: str) -> tuple[Message, ...]:
    return {"role": "user", "content": question}, *({"role": "assistant", "content": answer} for answer in answers)


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BadRecord("not an object")
    return value


def _field(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise BadRecord(f"has no '{name}'")
    return fields[name]


def _messages(value: Any, what: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise BadRecord(f"{what} is not a list of messages")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRecord(f"{what} holds a message without a role")
        content = message.get("content")
        if not isinstance(content, str):
            raise BadRecord("the content of a message is not text")
        if message["role"] == "assistant":
            _checked_text(content, "the content of an assistant's message")
        _check_encodable(content)
        messages.append({key: item for key, item in message.items() if item is not None})
    return tuple(messages)


def _checked_text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{what} is not text")
    if not value.strip():
        raise BadRecord(f"{what} is empty")
    _check_encodable(value)
    return value


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which is no character
        raise BadRecord("holds a lone surrogate (\\ud800 to \\udfff), which is no character") from None
