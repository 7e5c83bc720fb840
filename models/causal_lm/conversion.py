"""Records into token sequences, by several processes.

    convert_all(records, tokenizer_folder, ...)   the records' sequences, or why there are none, in the same order

Rendering templates holds the interpreter's lock, so workers are processes. They start anew rather than as forks, since
the threads of the libraries in use do not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple, TypeVar

from trunkline.engine.errors import DataError
from trunkline.engine.machine.workers import end_with_parent
from trunkline.models.causal_lm.records import Conversation, Preference, Record, Text
from trunkline.models.causal_lm.rendering import Rendered, Renderer
from trunkline.models.text.sources import BadRecord
from trunkline.models.text.tokenizer import load_tokenizer

_BATCH_CHARACTERS = 1 << 19
_BATCH_RECORDS = 512
_BATCHES_AHEAD = 3  # for each worker: what bounds the memory


class Converted(NamedTuple):
    """The record's sequences, or the reason why it cannot be rendered; and what is to be said of them."""

    result: list[Rendered] | str
    notes: list[str]


_Tag = TypeVar("_Tag")
_renderer: Renderer | None = None


def convert_all(
    records: Iterable[tuple[_Tag, Record]], tokenizer_folder: Path, workers: int, template: str = "the chat template"
) -> Generator[tuple[_Tag, Record, Converted], None, None]:
    """(tag, record, its sequences) in the order of `records` for any number of workers; one works in this process.

    template: what an error calls the chat template

    Holds a few batches of half a million characters for each worker. Close the iterator to stop early.
    """
    if workers == 1:
        renderer = Renderer(load_tokenizer(tokenizer_folder), template)
        for tag, record in records:
            yield tag, record, _convert(renderer, record)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer_folder, template))
    waiting: deque[tuple[list[tuple[_Tag, Record]], Future[list[Converted]]]] = deque()
    try:
        for batch in _batches(records):
            waiting.append((batch, pool.submit(_convert_batch, [record for _, record in batch])))
            if len(waiting) > _BATCHES_AHEAD * workers:
                yield from _results(*waiting.popleft())
        while waiting:
            yield from _results(*waiting.popleft())
    except BrokenProcessPool as error:
        raise DataError(f"a worker died ({error}): if memory ran out, use fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def characters(record: Record) -> int:
    """The length of a record's text."""
    return sum(map(len, texts(record)))


def texts(record: Record) -> list[str]:
    """What a tokenizer is to learn from a record."""
    if isinstance(record, Text):
        return [record.text]
    if isinstance(record, Conversation):
        return [message["content"] for message in record.messages]
    assert isinstance(record, Preference)
    return [message["content"] for message in (*record.prompt, *record.chosen, *record.rejected)]


def _results(
    batch: list[tuple[_Tag, Record]], future: Future[list[Converted]]
) -> Generator[tuple[_Tag, Record, Converted], None, None]:
    for (tag, record), converted in zip(batch, future.result()):
        yield tag, record, converted


def _batches(records: Iterable[tuple[_Tag, Record]]) -> Generator[list[tuple[_Tag, Record]], None, None]:
    batch: list[tuple[_Tag, Record]] = []
    size = 0
    for tag, record in records:
        batch.append((tag, record))
        size += characters(record)
        if size >= _BATCH_CHARACTERS or len(batch) >= _BATCH_RECORDS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _start_worker(tokenizer_folder: Path, template: str) -> None:
    global _renderer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the pool
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    _renderer = Renderer(load_tokenizer(tokenizer_folder), template)


def _convert_batch(records: list[Record]) -> list[Converted]:
    assert _renderer is not None
    return [_convert(_renderer, record) for record in records]


def _convert(renderer: Renderer, record: Record) -> Converted:
    notes: list[str] = []
    try:
        return Converted(renderer.render(record, notes.append), list(dict.fromkeys([*record.notes, *notes])))
    except BadRecord as bad:
        return Converted(str(bad), [])
