"""From files of text, conversations or preferences to a prepared store of tokens.

    run(arguments)   `python launchers/prepare.py causal_lm ...`
    prepare(sources, out, ...)              read, check, tokenize and store every record

What is written depends on the files and the settings only, not on the number of workers. A store is written whole or
not at all; run again, the same command finds it finished and does nothing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trunkline.engine.data.store import INDEX
from trunkline.engine.data.store_writer import check_out, draft_of, finished
from trunkline.engine.errors import ConfigError, DataError
from trunkline.engine.machine.files import entry
from trunkline.models.causal_lm.conversion import characters, convert_all, texts
from trunkline.models.causal_lm.flags import DEFAULT_VAL_FRACTION, DEFAULT_VOCAB_SIZE
from trunkline.models.causal_lm.records import Kind, Record, record_of, side_of
from trunkline.models.causal_lm.store import Store
from trunkline.models.causal_lm.store_writer import StoreWriter
from trunkline.models.causal_lm.tokenizer import MIN_VOCAB_SIZE, train_tokenizer
from trunkline.models.text.skipped import Skipped, Tally, remarks
from trunkline.models.text.sources import Problem, find_files
from trunkline.models.text.splits import Split, Splits
from trunkline.models.text.tokenizer import load_tokenizer, tokenizer_digest, vocabulary_size
from trunkline.models.text.tokenizer_files import copy_tokenizer, overridden, same_tokens, set_chat_template

SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
_WORTH_A_PROCESS = 8 << 20  # characters: a process needs seconds to start
_LARGEST_TEMPLATE = 1 << 20
_TRIED, _TRIED_CHARACTERS = 64, 10_000  # records, and of each text in them, by which tokenizers are compared


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line says. Raises ConfigError and DataError."""
    if arguments.vocab_size is not None and not arguments.train_tokenizer:
        raise ConfigError("--vocab-size: goes with --train-tokenizer; a tokenizer that is given has its own")
    sources, val_sources = arguments.source or [], arguments.val_source or []
    if arguments.example:
        if val_sources or arguments.val_fraction is not None:
            raise ConfigError("--example has validation records of its own: leave out --val-source and --val-fraction")
        sources, val_sources = _write_example(arguments.out, arguments.kind)
    try:
        store, is_new = prepare(
            sources,
            arguments.out,
            kind=arguments.kind,
            tokenizer=arguments.tokenizer,
            vocab_size=DEFAULT_VOCAB_SIZE if arguments.vocab_size is None else arguments.vocab_size,
            val_fraction=DEFAULT_VAL_FRACTION if arguments.val_fraction is None else arguments.val_fraction,
            val_sources=val_sources,
            chat_template=arguments.chat_template,
            workers=arguments.workers,
            max_bad_fraction=arguments.max_bad_fraction,
            progress=True,
        )
    except OSError as error:  # a full disk, a folder that must not be written
        raise DataError(f"{arguments.out}: {error}: mend that and run the same command again") from error
    if not is_new:
        print(f"{arguments.out}: already prepared from the same files; nothing to do")
        if "noted" not in store.index:
            print(
                "  by a version that did not read 'weight', 'train', 'system' and 'history': remove it to prepare anew"
            )
    print(_summary(store))


def prepare(
    sources: Sequence[Path],
    out: Path,
    *,
    kind: Kind,
    tokenizer: Path | None = None,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    val_fraction: float = DEFAULT_VAL_FRACTION,
    val_sources: Sequence[Path] = (),
    chat_template: Path | None = None,
    workers: int | None = None,
    max_bad_fraction: float = 0.1,
    progress: bool = False,
) -> tuple[Store, bool]:
    """Prepare the records of `sources` as a store in `out`; returns it, and whether there was anything to do.

    tokenizer: the folder of one; without, one of `vocab_size` tokens is trained on the records of the split "train"
    val_fraction: share of the records that becomes the split "val", chosen by their content, so that equal records lie
        on the same side; of no account where there are `val_sources`
    chat_template: a file that replaces the tokenizer's own template
    workers: processes; the default is one for each core, or one alone for a few megabytes

    Raises ConfigError for settings that cannot be, and for an `out` that holds something else. Raises DataError for
    files that cannot be read, for more bad records than `max_bad_fraction` of all, and for a split left empty.
    """
    _check_settings(vocab_size, val_fraction, max_bad_fraction, workers)
    files, val_files = find_files(sources, SUFFIXES), find_files(val_sources, SUFFIXES)
    if both := {path.resolve() for path in files} & {path.resolve() for path in val_files}:
        raise ConfigError(f"{min(both)}: given both to train on and as --val-source: leave it out of one")
    check_out(out, *sources, *val_sources)
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    made_from: dict[str, Any] = {
        "kind": kind,
        "source": _file_digests(files),
        "validation": _file_digests(val_files) if val_files else val_fraction,
        "tokenizer": vocab_size if given is None else tokenizer_digest(given),
        "chat template": None if chat_template is None else _template(chat_template),
    }
    if (out / INDEX).is_file():
        store = finished(Store, out, made_from)
        if given is not None and given.backend_tokenizer.to_str() != store.tokenizer().backend_tokenizer.to_str():
            raise ConfigError(
                f"{out}: its tokens are not those of {tokenizer}, which an earlier version did not copy faithfully: "
                "remove that folder and run the same command again"
            )
        return store, False

    records = Splits(files, val_files, val_fraction, partial(record_of, kind=kind), side_of)
    skipped, noted = Skipped(max_bad_fraction), Tally()
    template = f"the chat template {chat_template or f'of {tokenizer or out}'}"
    counts, size = _survey(records, skipped, sources, progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    with draft_of(out) as draft:
        training = (text for _, split, record in records.good() if split == "train" for text in texts(record))
        used = train_tokenizer(training, vocab_size) if given is None else given
        folder = draft / "tokenizer"
        if tokenizer is None:
            used.save_pretrained(folder)
        else:
            copy_tokenizer(used, tokenizer, folder)
        if chat_template is not None:
            used.chat_template = made_from["chat template"]
            set_chat_template(folder, made_from["chat template"])
        tried = [text[:_TRIED_CHARACTERS] for _, _, record in islice(records.good(), _TRIED) for text in texts(record)]
        same_tokens(used, load_tokenizer(folder), tried, tokenizer or folder)
        overrides = overridden(used, tokenizer or folder, tried)
        good = (((place, split), record) for place, split, record in records.good())
        workers = workers or max(1, min(len(os.sched_getaffinity(0)), size // _WORTH_A_PROCESS))
        with (
            StoreWriter(draft, kind, vocabulary_size(used)) as writer,
            tqdm(total=counts["train"] + counts["val"], unit=" records", disable=not progress) as bar,
            closing(convert_all(good, draft / "tokenizer", workers, template)) as converted,
        ):
            total, tokens = skipped.count + counts["train"] + counts["val"], 0
            for (place, split), _, (result, said) in converted:
                if isinstance(result, str):
                    skipped.add(Problem(place, result))
                    skipped.check(total)
                    counts[split] -= 1
                else:
                    writer.add(split, result)
                    for reason in said:
                        noted.add(place, reason)
                    tokens += sum(len(sequence.ids) for sequence in result)
                if bar.update():
                    seconds = bar.format_dict["elapsed"]
                    bar.set_postfix_str(f"{tokens / max(seconds, 1e-9):,.0f} tokens/s")
            _check_counts(counts, sources, records.has_val)
            tallies = {"skipped": skipped.to_json(), "noted": noted.to_json()}
            return writer.finish(out, made_from=made_from, overrides=overrides, **tallies, records=counts), True


def _survey(
    records: Splits[Record], skipped: Skipped, sources: Sequence[Path], progress: bool
) -> tuple[dict[Split, int], int]:
    """Good records of each split and their characters; too many bad ones show here, before hours of tokenizing."""
    counts: dict[Split, int] = {"train": 0, "val": 0}
    size = 0
    for item in tqdm(records, desc="reading", unit=" records", disable=not progress):
        if isinstance(item, Problem):
            skipped.add(item)
        else:
            counts[item[1]] += 1
            size += characters(item[2])
    skipped.check(skipped.count + counts["train"] + counts["val"])
    _check_counts(counts, sources, records.has_val)
    return counts, size


def _check_counts(counts: dict[Split, int], sources: Sequence[Path], needs_val: bool) -> None:
    shown = ", ".join(map(str, sources[:3])) + ", ..." * (len(sources) > 3)
    if counts["train"] == 0:
        raise DataError(f"{shown}: no records to train on: check the files, and that --kind says what they hold")
    if needs_val and counts["val"] == 0:
        raise DataError(
            f"{shown}: {counts['train']:,} records to train on and none for validation: raise --val-fraction, or give "
            "--val-source"
        )


def _check_settings(vocab_size: int, val_fraction: float, max_bad_fraction: float, workers: int | None) -> None:
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(f"--vocab-size {vocab_size}: use {MIN_VOCAB_SIZE} or more, for the bytes and the marks alone")
    if not 0 <= val_fraction < 1:
        raise ConfigError(f"--val-fraction {val_fraction}: use a number from 0 to below 1, such as 0.05")
    if not 0 <= max_bad_fraction <= 1:
        raise ConfigError(f"--max-bad-fraction {max_bad_fraction}: use a number from 0 to 1, such as 0.1")
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers}: use 1 or more")


def _file_digests(files: Sequence[Path]) -> list[list[str]]:
    """[[name, SHA-256], ...] in the order in which the files are read; where they lie is of no account."""
    return [[path.name, entry(path, follow=True)["sha256"]] for path in files]


def _template(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST_TEMPLATE:
            raise ConfigError(f"{path}: larger than {_LARGEST_TEMPLATE >> 20} MiB: not a chat template")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): check --chat-template") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start + 1}): save it as UTF-8") from error
    if not text.strip():
        raise ConfigError(f"{path}: empty: a chat template writes messages as text")
    return text


def _write_example(out: Path, kind: Kind) -> tuple[list[Path], list[Path]]:
    from trunkline.models.causal_lm.examples import MADE_UP, write_examples

    folder = out.parent / "example"
    counts = write_examples(folder)
    print(f"{folder}: {counts[f'{kind}.jsonl']:,} {kind} for training, {counts[f'{kind}-val.jsonl']:,} for validation")
    if kind == "preferences":
        print(MADE_UP)
    return [folder / f"{kind}.jsonl"], [folder / f"{kind}-val.jsonl"]


def _summary(store: Store) -> str:
    text = [f"{store.root}: {store.kind}, {store.vocab_size:,} tokens in the vocabulary"]
    for split, counted in store.entries.items():
        learned = f", {counted.learned:,} of them learned" if store.kind != "text" else ""
        text.append(
            f"  {split}: {store.index['records'][split]:,} records, {counted.tokens:,} tokens{learned}; "
            f"the longest has {counted.longest:,}"
        )
    return "\n".join(text + [f"  {line}" for line in remarks(store.index)])
