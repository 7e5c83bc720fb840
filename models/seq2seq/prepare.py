"""From files of prompts and responses, or of texts, to a prepared store of tokens.

    run(arguments)   `python launchers/prepare.py seq2seq ...`
    prepare(sources, out, ...)              read, check, tokenize and store every record

What is written depends on the files and the settings only. A store is written whole or not at all; run again, the same
command finds it finished and does nothing. Memory does not grow with the files, but for 8 bytes for each record that is
held out, by which it is found among those that are trained on, and 16 for each record's place.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trunkline.engine.data.store import INDEX
from trunkline.engine.data.store_writer import check_out, draft_of, finished
from trunkline.engine.errors import ConfigError, DataError
from trunkline.engine.machine.files import entry
from trunkline.models.seq2seq.conversion import Converter
from trunkline.models.seq2seq.example import write_numbers
from trunkline.models.seq2seq.flags import DEFAULT_VAL_FRACTION, DEFAULT_VOCAB_SIZE
from trunkline.models.seq2seq.records import FIELDS, Kind, Record, content, pair_of, text_of
from trunkline.models.seq2seq.store import Store
from trunkline.models.seq2seq.tokenizer import check_marks, check_sizes, train_tokenizer
from trunkline.models.text.column_store import ColumnWriter
from trunkline.models.text.held_out import HeldOut
from trunkline.models.text.skipped import Skipped, Tally, remarks
from trunkline.models.text.sources import Place, Problem, find_files, read_records
from trunkline.models.text.splits import Splits
from trunkline.models.text.tokenizer import load_tokenizer, tokenizer_digest, vocabulary_size
from trunkline.models.text.tokenizer_files import copy_tokenizer, overridden, same_tokens

SUFFIXES = {"pairs": (".parquet", ".jsonl", ".json", ".csv", ".tsv"), "text": (".parquet", ".jsonl", ".json", ".txt")}
_AT_ONCE, _CHARACTERS_AT_ONCE = 1024, 1 << 22  # of records; the tokenizer works on them in parallel
_TRIED, _TRIED_CHARACTERS = 64, 10_000  # records, and of each text in them, by which tokenizers are compared


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line says. Raises ConfigError and DataError."""
    if arguments.example:
        _write_example(arguments)
        return
    if arguments.tokenizer is None and not arguments.train_tokenizer:
        raise ConfigError("--source: needs --tokenizer FOLDER or --train-tokenizer")
    for flag, value in (("--vocab-size", arguments.vocab_size), ("--max-token-length", arguments.max_token_length)):
        if value is not None and not arguments.train_tokenizer:
            raise ConfigError(f"{flag}: goes with --train-tokenizer; a tokenizer that is given has its own")
    try:
        store, is_new = prepare(
            arguments.source, arguments.out, kind=arguments.kind, fields=tuple(arguments.fields),
            tokenizer=arguments.tokenizer,
            vocab_size=DEFAULT_VOCAB_SIZE if arguments.vocab_size is None else arguments.vocab_size,
            max_token_length=arguments.max_token_length, val_sources=arguments.val_source or [],
            test_sources=arguments.test_source or [],
            val_fraction=DEFAULT_VAL_FRACTION if arguments.val_fraction is None else arguments.val_fraction,
            max_bad_fraction=arguments.max_bad_fraction, progress=True,
        )  # fmt: skip
    except OSError as error:  # a full disk, a folder that must not be written
        raise DataError(f"{error}: mend that and run the same command again") from error
    if not is_new:
        print(f"{arguments.out}: already prepared from the same files; nothing to do")
    print(f"{store.root}: {store.kind}, {store.vocab_size:,} tokens in the vocabulary")
    if arguments.train_tokenizer and store.vocab_size < (asked := arguments.vocab_size or DEFAULT_VOCAB_SIZE):
        print(f"  --vocab-size {asked:,}: the records give no more than {store.vocab_size:,}")
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

    fields: what prompt and response are called
    tokenizer: the folder of one; without, one of `vocab_size` tokens, of `max_token_length` characters at most each, is
        trained on the records of the split "train"
    val_fraction: share of the records that becomes the split "val", chosen by their content, so that equal records lie
        on the same side; of no account where there are `val_sources`

    Raises ConfigError for settings that cannot be, and for an `out` that holds something else. Raises DataError for
    files that cannot be read, for more bad records than `max_bad_fraction` of all, and for a split left empty.
    """
    _check_settings(sources, kind, fields, val_fraction, max_bad_fraction)
    files, val_files, test_files = (find_files(each, SUFFIXES[kind]) for each in (sources, val_sources, test_sources))
    _check_apart({"--source": files, "--val-source": val_files, "--test-source": test_files})
    check_out(out, *sources, *val_sources, *test_sources)
    if tokenizer is None:
        check_sizes(vocab_size, max_token_length)
        given = None
    else:
        given = load_tokenizer(tokenizer)
        check_marks(given, tokenizer)
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
    records = _Records(Splits(files, val_files, val_fraction, record_of, content), test_files, record_of)
    skipped, noted = Skipped(max_bad_fraction), Tally()
    counts, held_out = _survey(records, skipped, sources, progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    with draft_of(out) as draft:
        texts = (text for _, split, record in records.good() if split == "train" for text in _texts(record))
        used = train_tokenizer(texts, vocab_size, max_token_length=max_token_length) if given is None else given
        folder = draft / "tokenizer"
        if tokenizer is None:
            used.save_pretrained(folder)
        else:
            copy_tokenizer(used, tokenizer, folder)
        tried = [text[:_TRIED_CHARACTERS] for *_, record in islice(records.good(), _TRIED) for text in _texts(record)]
        same_tokens(used, load_tokenizer(folder), tried, tokenizer or folder)
        overrides = overridden(used, tokenizer or folder, tried)
        convert, total = Converter(used, kind), skipped.count + counts.total()
        with (
            ColumnWriter(draft, Store, kind, vocabulary_size(used), list(counts)) as writer,
            tqdm(total=counts.total(), unit=" records", desc="tokenize", disable=not progress) as bar,
        ):
            for some in _batches(records.good()):
                for (place, split, record), tokens in zip(some, convert([record for *_, record in some]), strict=True):
                    if isinstance(tokens, str):
                        skipped.add(Problem(place, tokens))
                        skipped.check(total)
                        counts[split] -= 1
                        continue
                    writer.add(split, tokens.source, tokens.target)
                    also = [f"{split} holds it, and {other} too" for other in held_out.also_in(split, content(record))]
                    unknown = ["holds what the tokenizer does not know"] * tokens.has_unknown
                    for reason in (*record.notes, *also, *unknown):
                        noted.add(place, reason)
                bar.update(len(some))
            _check_counts(counts, sources)
            tallies = {"skipped": skipped.to_json(), "noted": noted.to_json()}
            return writer.finish(out, made_from=made_from, overrides=overrides, **tallies), True


@dataclass(frozen=True)
class _Records:
    """Those of `splits`, and the records to test on. Iterate as often as you like."""

    splits: Splits[Record]
    test_files: Sequence[Path]
    record_of: Callable[[Any], Record]

    def __iter__(self) -> Iterator[tuple[Place, str, Record] | Problem]:
        yield from self.splits
        for item in read_records(self.test_files, self.record_of):
            yield item if isinstance(item, Problem) else (item[0], "test", item[1])

    def good(self) -> Iterator[tuple[Place, str, Record]]:
        return (item for item in self if not isinstance(item, Problem))


def _texts(record: Record) -> list[str]:
    """What a tokenizer is to learn from a record."""
    return [text for text in (*record.turns, record.response) if text]


def _survey(
    records: _Records, skipped: Skipped, sources: Sequence[Path], progress: bool
) -> tuple[Counter[str], HeldOut]:
    """Good records of each split; too many bad ones show here, before hours of tokenizing."""
    counts = Counter(dict.fromkeys(("train", "val", "test") if records.test_files else ("train", "val"), 0))
    held_out = HeldOut()
    for item in tqdm(records, desc="reading", unit=" records", disable=not progress):
        if isinstance(item, Problem):
            skipped.add(item)
        else:
            counts[item[1]] += 1
            held_out.add(item[1], content(item[2]))
    skipped.check(skipped.count + counts.total())
    _check_counts(counts, sources)
    return counts, held_out


def _batches(records: Iterator[tuple[Place, str, Record]]) -> Iterator[list[tuple[Place, str, Record]]]:
    some: list[tuple[Place, str, Record]] = []
    size = 0
    for item in records:
        some.append(item)
        size += sum(map(len, _texts(item[2])))
        if size >= _CHARACTERS_AT_ONCE or len(some) == _AT_ONCE:
            yield some
            some, size = [], 0
    if some:
        yield some


def _check_counts(counts: Counter[str], sources: Sequence[Path]) -> None:
    shown = ", ".join(map(str, sources[:3])) + ", ..." * (len(sources) > 3)
    if not counts["train"]:
        raise DataError(f"{shown}: no records to train on: check the files, and that --kind says what they hold")
    if not counts["val"]:
        raise DataError(
            f"{shown}: {counts['train']:,} records to train on and none for validation: raise --val-fraction, or give "
            "--val-source"
        )
    if counts.get("test") == 0:
        raise DataError("--test-source: no record of it can be used: check the files, or leave it out")


def _check_settings(
    sources: Sequence[Path], kind: Kind, fields: tuple[str, str], val_fraction: float, max_bad_fraction: float
) -> None:
    if not sources:
        raise ConfigError("--source: give the files to prepare, or folders of them")
    if kind == "text" and fields != FIELDS:
        raise ConfigError(f"--fields {' '.join(fields)}: goes with --kind pairs; a text is in the field 'text'")
    if fields[0] == fields[1]:
        raise ConfigError(f"--fields {fields[0]} {fields[1]}: the prompt and the response need a field each")
    if not 0 < val_fraction < 1:
        raise ConfigError(f"--val-fraction {val_fraction:g}: use a number between 0 and 1, such as 0.05")
    if not 0 <= max_bad_fraction <= 1:
        raise ConfigError(f"--max-bad-fraction {max_bad_fraction:g}: use a number from 0 to 1, such as 0.1")


def _check_apart(given: dict[str, list[Path]]) -> None:
    """Raises ConfigError for a file that is given to two flags."""
    seen: dict[Path, str] = {}
    for flag, files in given.items():
        for path in files:
            if (other := seen.setdefault(path.resolve(), flag)) != flag:
                raise ConfigError(f"{path}: given as {other} and as {flag}: leave it out of one")


def _digests(files: Sequence[Path]) -> list[list[str]]:
    """[[name, SHA-256], ...] in the order in which the files are read; where they lie is of no account."""
    return [[path.name, entry(path, follow=True)["sha256"]] for path in files]
