"""Chat templates, rendered in a process of their own.

    render(tokenizer, messages, asked, tools)   the texts that are asked for
    render_marked(tokenizer, messages, tools)   the text, and what of it stands between {% generation %} marks

A template is a program that comes with a folder. Jinja's sandbox keeps it from files and from Python's insides, but not
from counting for hours or from making a text of gigabytes, and out of 9 ** (9 ** 9) nothing within the process returns.
So templates run in a child (models/text/template_process.py), with a limit on its memory, on the text and on the
processor time, which neither a busy machine nor a suspended one uses up. The child starts with the first call and ends
with this process.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from trunkline.models.text.sources import BadRecord
from trunkline.models.text.template_process import read, serve, write

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CPU_SECONDS = 10.0

Message = Mapping[str, Any]
"""{"role": str, "content": str}, and what else the template may want."""


class Asked(NamedTuple):
    """One text: of the first `stop` messages (all by default), or of `others` in their place."""

    stop: int | None = None
    generation_prompt: bool = False
    others: Sequence[Message] | None = None
    tools: bool = True


class TemplateLimit(BadRecord):
    """A template was stopped. The text completes "the chat template ..."."""


def render(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    asked: Sequence[Asked],
    tools: Sequence[Any] = (),
    cpu_seconds: float | None = None,
) -> list[str | BadRecord]:
    """The texts, each as transformers' apply_chat_template writes it, or what the template says against it.

    Raises TemplateLimit for more than `cpu_seconds` (CPU_SECONDS by default) for all together, more than 1 GiB of
    memory, or a text that is out of all proportion to the messages.
    """
    texts = _call(tokenizer, messages, tools, asked, cpu_seconds)["texts"]
    return [texts[0][:item] if isinstance(item, int) else _text(item) for item in texts]


def render_marked(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], tools: Sequence[Any] = ()
) -> tuple[str, list[tuple[int, int]]]:
    """The text of all messages, and first and last + 1 character of each marked part. Raises BadRecord."""
    found = _call(tokenizer, messages, tools, [], None)["marked"]
    if isinstance(found, dict):
        raise _failed(found)
    return found[0], [(start, end) for start, end in found[1]]


def _text(item: str | dict[str, str]) -> str | BadRecord:
    return item if isinstance(item, str) else _failed(item)


def _failed(item: dict[str, str]) -> BadRecord:
    return BadRecord(f"the chat template fails: {item['failed']}")


def _call(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    tools: Sequence[Any],
    asked: Sequence[Asked],
    cpu_seconds: float | None,
) -> dict[str, Any]:
    try:
        template: Any = tokenizer.get_chat_template(tools=list(tools) or None)
    except ValueError as error:  # several templates, and none of them the default
        raise _failed({"failed": str(error).splitlines()[0]}) from error
    call = {
        "template": template,
        "tokens": tokenizer.special_tokens_map,
        "messages": list(messages),
        "tools": list(tools) or None,
        "asked": [tuple(item) for item in asked],
        "cpu_seconds": cpu_seconds or CPU_SECONDS,
    }
    reply = _child_of_this_process().call(pickle.dumps(call))
    if isinstance(reply, int):
        timed_out = reply == -signal.SIGPROF
        what = f"takes more than {call['cpu_seconds']:g} s" if timed_out else f"ended its process (status {reply})"
        raise TemplateLimit(what)
    if "limit" in reply:
        raise TemplateLimit(reply["limit"])
    return reply


class _Child:
    """The process that renders, as this process sees it."""

    def __init__(self) -> None:
        self._parent, self._lock = os.getpid(), threading.Lock()
        path = [os.path.abspath(folder) for folder in sys.path]  # of its own it would begin with the working directory
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path = {path}; from {serve.__module__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        atexit.register(self.end)

    def serves(self) -> bool:
        return self._parent == os.getpid() and self._process.poll() is None

    def call(self, data: bytes) -> dict[str, Any] | int:
        """What it replies, or the status with which it ended in place of that."""
        with self._lock:
            try:
                write(self._stdin, data)
                reply = read(self._stdout)
            except BrokenPipeError:
                reply = None
            except BaseException:  # an interrupt: the reply to this call would be taken for that to the next one
                self.end()
                raise
            if reply is not None:
                return json.loads(reply)
            self._process.wait()
            return self.end()

    def end(self) -> int:
        """Its status."""
        atexit.unregister(self.end)
        self._process.kill()
        for pipe in (self._stdin, self._stdout):
            with suppress(BrokenPipeError):  # what it did not read
                pipe.close()
        return self._process.wait()


_child: _Child | None = None
_starting = threading.Lock()


def _child_of_this_process() -> _Child:
    global _child
    with _starting:
        if _child is None or not _child.serves():
            _child = _Child()
        return _child
