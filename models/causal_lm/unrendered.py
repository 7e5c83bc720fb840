"""What of a conversation a chat template leaves out or changes.

    Unrendered(messages, tools)    .asked: the texts that tell it; .report(whole, texts, note)

A text of a message reaches the rendering if it stands there as it is, but for space around it, and if a made-up word in
the middle of it comes out as well, for a short text may stand there by chance. Any other value reaches the rendering if
it is another one without that value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from trunkline.models.causal_lm.records import Message
from trunkline.models.text.chat_template import Asked
from trunkline.models.text.sources import BadRecord

_LONGEST_NAME = 40


class Unrendered:
    """Of `messages` and `tools`, rendered with the prompt of generation or without."""

    def __init__(self, messages: Sequence[Message], tools: Sequence[Any], generation_prompt: bool = False) -> None:
        self._messages, self._tools = messages, tools
        self._texts: list[tuple[int, str, str]] = []  # message, key and word
        self._values: list[tuple[int, str]] = []
        worded = [dict(message) for message in messages]
        others: list[Sequence[Message]] = [worded]
        for i, key, value in _fields(messages):
            if isinstance(value, str):
                self._texts.append((i, key, f"zq{len(self._texts)}xj"))
                worded[i][key] = value[: len(value) // 2] + self._texts[-1][-1] + value[len(value) // 2 :]
            else:
                for less in _without(messages[i], key, value):
                    self._values.append((i, key))
                    others.append([*messages[:i], less, *messages[i + 1 :]])
        self.asked = [Asked(None, generation_prompt, other) for other in others]
        if tools:
            self.asked.append(Asked(None, generation_prompt, tools=False))

    def report(self, whole: str, texts: Sequence[str | BadRecord], note: Callable[[str], None]) -> None:
        """Call `note` for what does not reach `whole`, given the `texts` that were asked for, once for each kind."""
        worded, *rest = texts
        found = [
            (i, key)
            for i, key, word in self._texts
            if self._messages[i][key].strip() not in whole or (isinstance(worded, str) and word not in worded)
        ]
        found += [value for value, text in zip(self._values, rest) if text == whole]
        for name in dict.fromkeys(_named(self._messages[i], key) for i, key in found):
            note(f"{name} is left out or changed by the chat template")
        if self._tools and rest[-1] == whole:
            note("'tools' is left out by the chat template")


def without_template(messages: Sequence[Message], tools: Sequence[Any], note: Callable[[str], None]) -> None:
    """The same where the tokenizer has no chat template, so that nothing but contents becomes tokens."""
    for message in messages:
        for key in [key for key in message if key not in ("role", "content")]:
            note(f"{_named(message, key)} is left out, because the tokenizer has no chat template")
    if tools:
        note("'tools' is left out, because the tokenizer has no chat template")


def _named(message: Message, key: str) -> str:
    what = "the content" if key == "content" else repr(key[:_LONGEST_NAME])
    return f"{what} of a message of role {message['role'][:_LONGEST_NAME]!r}"


def _fields(messages: Sequence[Message]) -> Iterator[tuple[int, str, Any]]:
    """Message, key and value of all that says something."""
    for i, message in enumerate(messages):
        for key, value in message.items():
            if key != "role" and (value.strip() if isinstance(value, str) else value not in (None, [], {})):
                yield i, key, value


def _without(message: Message, key: str, value: Any) -> Iterator[Message]:
    """The message without the value; of a list, without each of its items."""
    if isinstance(value, list) and len(value) > 1:
        for place in range(len(value)):
            yield {**message, key: [*value[:place], *value[place + 1 :]]}
    else:
        yield {name: item for name, item in message.items() if name != key}
