"""From files of prompts and responses, or of texts, to a prepared store of tokens.

    run(arguments)   `python launchers/prepare.py seq2seq ...`
    prepare(sources, out, ...)              read, check, tokenize and store every record

What is written depends on the files and the settings only. A store is written whole or not at all; run again, the same
command finds it finished and does nothing.
"""

from __future__ import annotations

import argparse
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from trunkline.engine.data.npy import NpyWriter, Spec
from trunkline.engine.data.store import INDEX
from trunkline.engine.data.store_writer import check_out, draft_of, finished, publish, write_index
from trunkline.engine.errors import ConfigError, DataError
from trunkline.engine.machine.files import entry
from trunkline.models.seq2seq.example import write_numbers
from trunkline.models.seq2seq.flags import DEFAULT_VAL_FRACTION, DEFAULT_VOCAB_SIZE
from trunkline.models.seq2seq.records import FIELDS, Kind, Record, pair_of, text_of
from trunkline.models.seq2seq.store import SplitEntry, Store, token_dtype
from trunkline.models.seq2seq.tokenizer import train_tokenizer
from trunkline.models.text.skipped import Skipped, remarks
from trunkline.models.text.sources import Problem, find_files, read_records
from trunkline.models.text.splits import Splits
from trunkline.models.text.tokenizer import load_tokenizer, tokenizer_digest, vocabulary_size
from trunkline.models.text.tokenizer_files import copy_tokenizer

SUFFIXES = {"pairs": (".parquet", ".jsonl", ".json", ".csv", ".tsv"), "text": (".parquet", ".jsonl", ".json", ".txt")}
_AT_ONCE = 1024  # records; the tokenizer works on them in parallel


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line says. Raises ConfigError and DataError."""
    if arguments.example:
        _write_example(arguments)
        return
    if arguments.tokenizer is None and not arguments.train_tokenizer:
        raise ConfigError("--source: needs --tokenizer FOLDER or --train-tokenizer")
    store, is_new = prepare(
        arguments.source, arguments.out, kind=arguments.kind, fields=tuple(arguments.fields),
        tokenizer=arguments.tokenizer, vocab_size=arguments.vocab_size or DEFAULT_VOCAB_SIZE,
        max_token_length=arguments.max_token_length, val_sources=arguments.val_source or [],
        test_sources=arguments.test_source or [],
        val_fraction=DEFAULT_VAL_FRACTION if arguments.val_fraction is None else arguments.val_fraction,
        max_bad_fraction=arguments.max_bad_fraction, progress=True,
    )  # fmt: skip
    if not is_new:
        print(f"{arguments.out}: already prepared from the same files; nothing to do")
    print(f"{store.root}: {store.kind}, {store.vocab_size:,} tokens in the vocabulary")
    for split, counted in store.entries.items():
        print(f"  {split}: {counted.samples:,} records, {counted.input_tokens:,} + {counted.target_tokens:,} tokens")
    for line in remarks(store.index):
        print(f"  {line}")


_OF_A_SOURCE = (
    "tokenizer", "train_tokenizer", "vocab_size", "max_token_length", "val_source", "test_source", "val_fraction",
)  # fmt: skip


def _write_example(arguments: argparse.Namespace) -> None:
    if given := [name for name in _OF_A_SOURCE if getattr(arguments, name)]:
        flag = f"--{given[0].replace('_', '-')}"
        raise ConfigError(f"{flag}: goes with --source; --example writes records, which are prepared next")
    for name, count in write_numbers(arguments.out).items():
        print(f"{arguments.out / name}: {count:,} records")


def prepare(
    sources: Sequence[Path], out: Path, *, kind: Kind = "pairs", fields: tuple[str, str] = FIELDS,
    tokenizer: Path | None = None, vocab_size: int = DEFAULT_VOCAB_SIZE, max_token_length: int | None = None,
    val_sources: Sequence[Path] = (), test_sources: Sequence[Path] = (), val_fraction: float = DEFAULT_VAL_FRACTION,
    max_bad_fraction: float = 0.1, progress: bool = False,
) -> tuple[Store, bool]:  # fmt: skip
    """Prepare the records of `sources` as a store in `out`; returns it, and whether there was anything to do.

    Raises ConfigError for settings that cannot be, and for an `out` that holds something else. Raises DataError for
    files that cannot be read, for more bad records than `max_bad_fraction` of all, and for a split left empty.
    """
    files, val_files, test_files = (find_files(each, SUFFIXES[kind]) for each in (sources, val_sources, test_sources))
    check_out(out, *sources, *val_sources, *test_sources)
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    made_from: dict[str, Any] = {
        "kind": kind,
        "fields": list(fields),
        "source": _digests(files),
        "validation": _digests(val_files) if val_files else val_fraction,
        "test": _digests(test_files),
        "tokenizer": [vocab_size, max_token_length] if given is None else tokenizer_digest(given),
    }
    if (out / INDEX).is_file():
        return finished(Store, out, made_from), False

    record_of: Callable[[Any], Record] = partial(pair_of, fields=fields) if kind == "pairs" else text_of
    records, skipped = Splits(files, val_files, val_fraction, record_of, "\n".join), Skipped(max_bad_fraction)
    out.parent.mkdir(parents=True, exist_ok=True)
    with draft_of(out) as draft, ExitStack() as stack:
        texts = (text for _, split, record in records.good() if split == "train" for text in record if text)
        used = train_tokenizer(texts, vocab_size, max_token_length=max_token_length) if given is None else given
        if tokenizer is None:
            used.save_pretrained(draft / "tokenizer")
        else:
            copy_tokenizer(used, tokenizer, draft / "tokenizer")
        size = vocabulary_size(used)
        splits = ["train", "val"] + ["test"] * bool(test_files)
        writers = {split: _SplitWriter(draft / split, kind, size, stack) for split in splits}
        good = _good(records, test_files, record_of, skipped)
        with tqdm(unit=" records", desc="tokenize", disable=not progress) as bar:
            while some := list(islice(good, _AT_ONCE)):
                encoded = [_encode(used, [record[side] for _, record in some]) for side in (0, 1)]
                for (split, _), ids, target in zip(some, *encoded, strict=True):
                    writers[split].add(ids, target)
                bar.update(len(some))
        skipped.check(skipped.count + sum(len(writer) for writer in writers.values()))
        if empty := [split for split, writer in writers.items() if not len(writer)]:
            raise DataError(f"{out}: no records for {empty[0]}: check the files")
        arrays: dict[str, Spec] = {}
        entries = {}
        for split, writer in writers.items():
            specs, entries[split] = writer.finish(split)
            arrays |= specs
        names = [f"tokenizer/{path.name}" for path in (draft / "tokenizer").iterdir() if path.is_file()]
        facts = {"kind": kind, "vocab_size": size, "splits": {name: vars(each) for name, each in entries.items()}}
        write_index(draft, Store.workload, arrays, names, facts, {"made_from": made_from, "skipped": skipped.to_json()})
        publish(draft, out)
    return Store.open(out), True


def _good(
    records: Splits[Record], test_files: Sequence[Path], record_of: Callable[[Any], Record], skipped: Skipped
) -> Iterator[tuple[str, Record]]:
    for item in records:
        if isinstance(item, Problem):
            skipped.add(item)
        else:
            yield item[1], item[2]
    for tested in read_records(test_files, record_of):
        if isinstance(tested, Problem):
            skipped.add(tested)
        else:
            yield "test", tested[1]


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return [found.ids for found in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _digests(files: Sequence[Path]) -> list[list[str]]:
    """[[name, SHA-256], ...] in the order in which the files are read; where they lie is of no account."""
    return [[path.name, entry(path, follow=True)["sha256"]] for path in files]


class _SplitWriter:
    def __init__(self, folder: Path, kind: Kind, vocab_size: int, stack: ExitStack) -> None:
        folder.mkdir()
        self._parts = ("input", "target") if kind == "pairs" else ("input",)
        dtype = token_dtype(vocab_size)
        self._tokens = {part: stack.enter_context(NpyWriter(folder / f"{part}s.npy", dtype)) for part in self._parts}
        self._where = {
            part: stack.enter_context(NpyWriter(folder / f"{part}_offsets.npy", "<i8")) for part in self._parts
        }
        self._offsets = {part: array("q", [0]) for part in self._parts}

    def __len__(self) -> int:
        return len(self._offsets["input"]) - 1

    def add(self, *sides: Sequence[int]) -> None:
        for part, ids in zip(self._parts, sides):
            self._tokens[part].add(np.asarray(ids))
            self._offsets[part].append(self._offsets[part][-1] + len(ids))

    def finish(self, split: str) -> tuple[dict[str, Spec], SplitEntry]:
        specs = {}
        for part in self._parts:
            self._where[part].add(np.frombuffer(self._offsets[part], np.int64))
            specs[f"{split}/{part}_offsets"] = self._where[part].finish()
            specs[f"{split}/{part}s"] = self._tokens[part].finish(f"{split}/{part}_offsets")
        totals = [self._offsets[part][-1] for part in self._parts]
        return specs, SplitEntry(len(self), totals[0], totals[1] if len(totals) > 1 else 0)
