"""From files of prompts and responses, or of texts, to a prepared store of tokens.

run(arguments)   `python launchers/prepare.py seq2seq ...`
prepare(sources, out, ...)              read, check, tokenize and store every record (trunkline.models.text.preparation)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trunkline.engine.errors import ConfigError
from trunkline.models.seq2seq.conversion import Converter
from trunkline.models.seq2seq.example import write_numbers
from trunkline.models.seq2seq.records import FIELDS, Kind, Record, content, pair_of, text_of, texts
from trunkline.models.seq2seq.store import Store
from trunkline.models.seq2seq.tokenizer import check_marks, check_sizes, train_tokenizer
from trunkline.models.text.preparation import Recipe, Tokenizer, find_inputs, from_folder, prepare_store, report
from trunkline.models.text.preparation_flags import DEFAULT_VAL_FRACTION, DEFAULT_VOCAB_SIZE

SUFFIXES = {"pairs": (".parquet", ".jsonl", ".json", ".csv", ".tsv"), "text": (".parquet", ".jsonl", ".json", ".txt")}


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
    vocab_size = DEFAULT_VOCAB_SIZE if arguments.vocab_size is None else arguments.vocab_size
    prepared = partial(
        prepare, arguments.source, arguments.out, kind=arguments.kind, fields=tuple(arguments.fields),
        tokenizer=arguments.tokenizer, vocab_size=vocab_size, max_token_length=arguments.max_token_length,
        val_sources=arguments.val_source or [], test_sources=arguments.test_source or [],
        val_fraction=DEFAULT_VAL_FRACTION if arguments.val_fraction is None else arguments.val_fraction,
        max_bad_fraction=arguments.max_bad_fraction, progress=True,
    )  # fmt: skip
    report(arguments.out, prepared, vocab_size if arguments.train_tokenizer else None)


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
    if kind == "text" and fields != FIELDS:
        raise ConfigError(f"--fields {' '.join(fields)}: goes with --kind pairs; a text is in the field 'text'")
    if fields[0] == fields[1]:
        raise ConfigError(f"--fields {fields[0]} {fields[1]}: the prompt and the response need a field each")
    inputs = find_inputs(
        sources, SUFFIXES[kind], out, val_sources=val_sources, test_sources=test_sources, val_fraction=val_fraction,
        max_bad_fraction=max_bad_fraction,
    )  # fmt: skip
    if tokenizer is None:
        check_sizes(vocab_size, max_token_length)
        trained = partial(train_tokenizer, vocab_size=vocab_size, max_token_length=max_token_length)
        used = Tokenizer(trained, [vocab_size, max_token_length])
    else:
        used = from_folder(tokenizer, check_marks)
    record_of: Callable[[Any], Record] = partial(pair_of, fields=fields) if kind == "pairs" else text_of
    converter = partial(Converter, kind=kind)
    recipe = Recipe(Store, kind, record_of, content, texts, converter, {"fields": list(fields)})
    return prepare_store(inputs, recipe, used, out, progress=progress)
