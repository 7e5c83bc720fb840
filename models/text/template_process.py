"""The process in which chat templates run.

Calls come on its stdin, replies go to its stdout (chat_template.py).

    serve()    what it does; read and write are both sides' of its pipes

A call is a pickle of the parent's and a reply is JSON, each after its length in 8 bytes. Little is imported here, for
every process that renders starts one of these.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

MEMORY_BYTES = 1 << 30
_LONGEST = 1 << 18  # characters of a text, and as many again for each byte of the call
_LONGER = 16


def write(pipe: IO[bytes], data: bytes) -> None:
    """Send `data`, which is not empty."""
    pipe.write(len(data).to_bytes(8, "little") + data)
    pipe.flush()


def read(pipe: IO[bytes]) -> bytes | None:
    """What was sent; None at the end."""
    size = pipe.read(8)
    return (pipe.read(int.from_bytes(size, "little")) if len(size) == 8 else b"") or None


def serve() -> None:
    """Answer calls until there are no more."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # sent to the whole group; the parent's end is ours
        signal.signal(number, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no reply
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    while (data := read(sys.stdin.buffer)) is not None:
        call = pickle.loads(data)
        signal.setitimer(signal.ITIMER_PROF, call["cpu_seconds"])  # SIGPROF ends the process, whatever it is doing
        try:
            reply = json.dumps(_answer(call, _LONGEST + _LONGER * len(data), render_jinja_template))
        except MemoryError:
            reply = json.dumps({"limit": f"needs more than {MEMORY_BYTES >> 30} GiB of memory"})
        except _TooLong:
            reply = json.dumps({"limit": "writes a text far longer than what it is given"})
        signal.setitimer(signal.ITIMER_PROF, 0)
        try:
            write(replies, reply.encode())
        except BrokenPipeError:  # the parent was killed: nobody waits for it
            os._exit(0)  # and nothing is written at the end


class _TooLong(Exception):  # noqa: N818 - it becomes a reply
    """A text is longer than it may be."""


def _answer(call: dict[str, Any], longest: int, render: Callable[..., Any]) -> dict[str, Any]:
    def rendered(messages: Any, prompt: bool, tools: Any, marked: bool = False) -> Any:
        try:
            (text,), marks = render(
                conversations=[[{k: v for k, v in message.items() if v is not None} for message in messages]],
                tools=tools,
                chat_template=call["template"],
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=marked,
                **call["tokens"],
            )
        except MemoryError:
            raise
        except Exception as error:  # a template raises what it likes
            return {"failed": (str(error).splitlines() or [type(error).__name__])[0]}
        if len(text) > longest:
            raise _TooLong
        return (text, marks[0]) if marked else text

    if not call["asked"]:
        return {"marked": rendered(call["messages"], False, call["tools"], True)}
    texts: list[Any] = []
    for stop, prompt, others, tools in call["asked"]:
        text = rendered(call["messages"][:stop] if others is None else others, prompt, call["tools"] if tools else None)
        # most are beginnings of the first; in full they would add up to the square of a conversation's length
        begins = bool(texts) and isinstance(text, str) and isinstance(texts[0], str) and texts[0].startswith(text)
        texts.append(len(text) if begins else text)
    return {"texts": texts}


def _limit_memory() -> None:
    used = Path("/proc/self/statm")
    if used.is_file():  # other systems than Linux keep no such limit
        now = int(used.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES,) * 2)
