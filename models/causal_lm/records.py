"""Records: what a line, an item or a row stands for.

    record_of(value, kind)    the record; BadRecord says why there is none
    side_of(record)           by which it is trained on, or validates

Three kinds, each in the fields that data sets use:

    text            {"text": ...}, or a string
    conversations   {"messages": [{"role", "content"}, ...]}, {"prompt", "response"} or {"input", "output"}
    preferences     {"prompt", "chosen", "rejected"} as text or as messages, as TRL has them; without "prompt", `chosen`
                    and `rejected` are whole conversations, and the prompt is what they begin with in common

Beside them the last two may have `system` (the system's turn), `history` (earlier turns: messages, or pairs of question
and answer) and `tools` (for the chat template), and a message of the assistant `weight`, `train` or `training`: 0 or
false if it is not to be learned. Other fields of a record are not used; its `notes` name those that hold anything.
Other fields of a message are the chat template's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from trunkline.models.text.fields import LONGEST_NAME, Fields, check_encodable, checked_text
from trunkline.models.text.sources import BadRecord

Kind = Literal["text", "conversations", "preferences"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Message = Mapping[str, Any]
"""{"role": str, "content": str}, "weight": 0 if it is not to be learned, and what else the chat template may want."""

_SYSTEM = ("system", "developer")
_LEARNED = ("weight", "train", "training")


@dataclass(frozen=True)
class Text:
    """notes: what of the record is not used, here and below."""

    text: str
    notes: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Conversation:
    """Messages, the answers that are to be learned among them."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Preference:
    """`chosen` and `rejected` each continue `prompt`, and each begins with the assistant."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)


Record = Text | Conversation | Preference


def record_of(value: Any, kind: Kind) -> Record:
    """The record that a file's value stands for. Raises BadRecord."""
    if kind == "text" and isinstance(value, str):
        return Text(checked_text(value, "the text"))
    fields = Fields(value)
    if kind == "text":
        return Text(checked_text(fields["text"], "the text"), fields.notes())
    tools, record = (
        _tools(fields.get("tools")),
        _conversation(fields) if kind == "conversations" else _preference(fields),
    )
    return replace(record, tools=tools, notes=fields.notes())


def side_of(record: Record) -> str:
    """What of a record decides whether it is trained on: the same for equal texts and messages."""
    messages = {name: value for name, value in vars(record).items() if name not in ("tools", "notes")}
    return record.text if isinstance(record, Text) else json.dumps(messages, sort_keys=True, default=str)


def _conversation(fields: Fields) -> Conversation:
    if "messages" in fields:
        messages = _with_earlier(_messages(fields, "messages"), fields)
        if not any(message["role"] == "assistant" for message in messages):
            raise BadRecord("'messages' has no turn of the assistant")
        if messages[0]["role"] == "assistant":
            raise BadRecord("'messages' begins with the assistant, so that there is nothing to answer")
        _check_learned(messages, "'messages'")
        return Conversation(messages)
    if "instruction" in fields:
        raise BadRecord("has 'instruction', which is not read: join it with 'input' into one field")
    for question, answer in (("prompt", "response"), ("input", "output")):
        if question in fields or answer in fields:
            prompt = checked_text(fields[question], f"'{question}'")
            turns = _exchange(prompt, checked_text(fields[answer], f"'{answer}'"))
            return Conversation(_with_earlier(turns, fields))
    raise BadRecord("has neither 'messages' nor 'prompt' and 'response' nor 'input' and 'output'")


def _preference(fields: Fields) -> Preference:
    sides = [fields[name] for name in ("chosen", "rejected")]
    if all(isinstance(side, str) for side in sides):
        question, *answers = _exchange(checked_text(fields["prompt"], "'prompt'"), *sides)
        for name, side in zip(("chosen", "rejected"), sides):
            checked_text(side, f"'{name}'")
        found = Preference((question,), (answers[0],), (answers[1],))
    elif all(isinstance(side, list) for side in sides):
        chosen, rejected = _messages(fields, "chosen"), _messages(fields, "rejected")
        prompt = fields.get("prompt")
        if isinstance(prompt, list):
            found = Preference(_messages(fields, "prompt"), chosen, rejected)
        elif prompt is not None and chosen[0]["role"] == rejected[0]["role"] == "assistant":
            found = Preference(_exchange(checked_text(prompt, "'prompt'")), chosen, rejected)
        else:
            same = [a == b for a, b in zip(chosen, rejected)]
            common = same.index(False) if False in same else len(same)
            found = Preference(chosen[:common], chosen[common:], rejected[common:])
            if prompt not in [message["content"] for message in found.prompt]:
                fields.used.discard("prompt")
    else:
        raise BadRecord("'chosen' and 'rejected' are not both text or both lists of messages")
    if found.chosen == found.rejected:
        raise BadRecord("'chosen' and 'rejected' are the same")
    if not found.prompt:
        raise BadRecord("'chosen' and 'rejected' begin with nothing in common, and there is no 'prompt'")
    for name, answer in (("chosen", found.chosen), ("rejected", found.rejected)):
        if not answer or answer[0]["role"] != "assistant":
            raise BadRecord(f"'{name}' has no turn of the assistant after the prompt")
        _check_learned(answer, f"'{name}'")
    return replace(found, prompt=_with_earlier(found.prompt, fields))


def _exchange(question: str, *answers: str) -> tuple[Message, ...]:
    return {"role": "user", "content": question}, *({"role": "assistant", "content": answer} for answer in answers)


def _with_earlier(messages: tuple[Message, ...], fields: Fields) -> tuple[Message, ...]:
    """`messages` after the turns of the fields 'system' and 'history'."""
    begins = 1 if messages[0]["role"] in _SYSTEM else 0
    turns = [*messages[:begins], *_history(fields), *messages[begins:]]
    system = fields.get("system")
    if system is None or (isinstance(system, str) and not system.strip()):
        return tuple(turns)
    checked_text(system, "'system'")
    if turns[0]["role"] not in _SYSTEM:
        return {"role": "system", "content": system}, *turns
    if turns[0]["content"].strip() != system.strip():
        raise BadRecord("'system' is another text than that of the system's turn")
    return tuple(turns)


def _history(fields: Fields) -> tuple[Message, ...]:
    history = fields.get("history")
    if not history:
        return ()
    if isinstance(history, list) and isinstance(history[0], dict):
        return _messages(fields, "history")
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRecord("'history' is neither a list of messages nor of pairs of question and answer")
    return tuple(turn for pair in history for turn in _exchange(*(checked_text(side, "'history'") for side in pair)))


def _tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    if isinstance(value, str):  # as tables hold them, whose rows all have the same fields
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            raise BadRecord("'tools' is text that is not JSON") from None
    if not isinstance(value or [], list) or not all(isinstance(tool, dict) for tool in value or []):
        raise BadRecord("'tools' is not a list of objects")
    for text in strings(value or []):
        check_encodable(text)
    return tuple(value or [])


def _messages(fields: Fields, name: str) -> tuple[Message, ...]:
    value, what = fields[name], f"'{name}'"
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
            checked_text(content, "the content of an assistant's message")
        for text in strings(message):
            check_encodable(text)
        messages.append(_weighted({key: item for key, item in message.items() if item is not None}, fields))
    return tuple(messages)


def _weighted(message: dict[str, Any], fields: Fields) -> Message:
    """The message with what says whether it is learned as "weight": 0, or nothing."""
    given = {key: message.pop(key) for key in _LEARNED if key in message}
    if not all(isinstance(value, int | float) and value in (0, 1) for value in given.values()):
        raise BadRecord(
            f"{' or '.join(map(repr, given))} of a message is neither 0 nor 1: a turn is learned or it is not"
        )
    if len({bool(value) for value in given.values()}) > 1:
        raise BadRecord(f"{' and '.join(map(repr, given))} of a message contradict one another")
    if message["role"] == "assistant":
        return message if all(given.values()) else {**message, "weight": 0}
    if given and all(given.values()):
        names, role = " and ".join(map(repr, given)), message["role"][:LONGEST_NAME]
        fields.said.append(
            f"{names} of a message of role {role!r} is not used: only what the assistant says is learned"
        )
    return message


def _check_learned(messages: Sequence[Message], what: str) -> None:
    if not any(message["role"] == "assistant" and message.get("weight", 1) for message in messages):
        raise BadRecord(f"{what} has weight 0 at every turn of the assistant, so that there is nothing to learn")


def strings(value: Any) -> Iterator[str]:
    """Every text in a value as JSON has them, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from (name, *strings(item))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item)
