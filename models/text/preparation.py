"""From files of records to a prepared store of token sequences: what the workloads of text do alike.

    find_inputs(sources, suffixes, out, ...)       the files of each split, checked
    from_folder(folder), Tokenizer(...)            a tokenizer that is given, and one that is to be made
    prepare_store(inputs, recipe, tokenizer, out)  read, check, tokenize and store every record
    report(out, prepare)                           does so, and prints what there is
    report_example(arguments, write, ...)          writes files of records in place of that

What is written depends on the files and the settings only. A store is written whole or not at all; run again, the same
command finds it finished and does nothing. Memory does not grow with the files, but for 8 bytes for each record that is
held out, by which it is found among those that are trained on, and 16 for each record's place.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tqdm import tqdm

from trunkline.engine.data.store import INDEX
from trunkline.engine.data.store_writer import check_out, draft_of, finished
from trunkline.engine.errors import ConfigError, DataError
from trunkline.engine.machine.files import entry
from trunkline.models.text.column_store import ColumnStore, ColumnWriter
from trunkline.models.text.conversion import Converted
from trunkline.models.text.held_out import HeldOut
from trunkline.models.text.skipped import Skipped, Tally, remarks
from trunkline.models.text.sources import Place, Problem, find_files
from trunkline.models.text.splits import Splits
from trunkline.models.text.tokenizer import load_tokenizer, tokenizer_digest, vocabulary_size
from trunkline.models.text.tokenizer_files import copy_tokenizer, overridden, same_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_AT_ONCE, _CHARACTERS_AT_ONCE = 1024, 1 << 22  # of records; the tokenizer works on them in parallel
_TRIED, _TRIED_CHARACTERS = 64, 10_000  # records, and of each text in them, by which tokenizers are compared
_R = TypeVar("_R")
_S = TypeVar("_S", bound=ColumnStore)


@dataclass(frozen=True)
class Inputs:
    """What is read. val_fraction: see Splits. max_bad_fraction: more bad records than that are an error."""

    sources: Sequence[Path]
    train: Sequence[Path]
    val: Sequence[Path]
    test: Sequence[Path]
    val_fraction: float
    max_bad_fraction: float


def find_inputs(
    sources: Sequence[Path], suffixes: Sequence[str], out: Path, *, val_sources: Sequence[Path],
    test_sources: Sequence[Path], val_fraction: float, max_bad_fraction: float,
) -> Inputs:  # fmt: skip
    """The files at these paths, and in the folders there, that end in one of `suffixes`.

    Raises ConfigError and DataError for paths and numbers that cannot be, for a file that is given to two flags, and
    for an `out` that holds something else or one of them.
    """
    if not sources:
        raise ConfigError("--source: give the files to prepare, or folders of them")
    if not 0 < val_fraction < 1:
        raise ConfigError(f"--val-fraction {val_fraction:g}: use a number between 0 and 1, such as 0.05")
    if not 0 <= max_bad_fraction <= 1:
        raise ConfigError(f"--max-bad-fraction {max_bad_fraction:g}: use a number from 0 to 1, such as 0.1")
    train, val, test = (find_files(each, suffixes) for each in (sources, val_sources, test_sources))
    seen: dict[Path, str] = {}
    for flag, files in {"--source": train, "--val-source": val, "--test-source": test}.items():
        for path in files:
            if (other := seen.setdefault(path.resolve(), flag)) != flag:
                raise ConfigError(f"{path}: given as {other} and as {flag}: leave it out of one")
    check_out(out, *sources, *val_sources, *test_sources)
    return Inputs(sources, train, val, test, val_fraction, max_bad_fraction)


@dataclass(frozen=True)
class Tokenizer:
    """made: from the texts that are trained on. named: what tells it from others. folder: of one that is given."""

    made: Callable[[Iterable[str]], PreTrainedTokenizerFast]
    named: Any
    folder: Path | None = None


def from_folder(folder: Path, check: Callable[[PreTrainedTokenizerFast, Path], None] | None = None) -> Tokenizer:
    """The one in `folder`. Raises ConfigError, and what `check` raises."""
    loaded = load_tokenizer(folder)
    if check is not None:
        check(loaded, folder)
    return Tokenizer(lambda _: loaded, tokenizer_digest(loaded), folder)


@dataclass(frozen=True)
class Recipe(Generic[_R, _S]):
    """How a workload makes its store.

    record_of, content, text_lines: see Splits
    texts: what of a record a tokenizer is to learn
    converter: makes of a tokenizer what makes of some records their columns and notes, or of each why it cannot be used
    settings: what else decides what is written
    """

    store: type[_S]
    kind: str
    record_of: Callable[[Any], _R]
    content: Callable[[_R], str]
    texts: Callable[[_R], Sequence[str]]
    converter: Callable[[PreTrainedTokenizerFast], Callable[[Sequence[_R]], Sequence[Converted | str]]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    text_lines: bool = False


def prepare_store(
    inputs: Inputs, recipe: Recipe[_R, _S], tokenizer: Tokenizer, out: Path, *, progress: bool = False
) -> tuple[_S, bool]:
    """The store in `out`, and whether there was anything to do.

    Raises ConfigError for an `out` that is a store of something else. Raises DataError for files that cannot be read,
    for too many bad records, and for a split left empty.
    """
    made_from: dict[str, Any] = {
        "kind": recipe.kind,
        **recipe.settings,
        "source": _digests(inputs.train),
        "validation": _digests(inputs.val) if inputs.val else inputs.val_fraction,
        "test": _digests(inputs.test),
        "tokenizer": tokenizer.named,
    }
    if (out / INDEX).is_file():
        return finished(recipe.store, out, made_from), False

    records = Splits(
        inputs.train, inputs.val, inputs.val_fraction, recipe.record_of, recipe.content, inputs.test, recipe.text_lines
    )
    skipped, noted = Skipped(inputs.max_bad_fraction), Tally()
    counts, held_out = _survey(records, skipped, inputs.sources, progress)
    out.parent.mkdir(parents=True, exist_ok=True)
    with draft_of(out) as draft:
        used, overrides = _placed(tokenizer, records, recipe.texts, draft / "tokenizer")
        convert, total = recipe.converter(used), skipped.count + counts.total()
        with (
            ColumnWriter(draft, recipe.store, recipe.kind, vocabulary_size(used), list(counts)) as writer,
            tqdm(total=counts.total(), unit=" records", desc="tokenize", disable=not progress) as bar,
        ):
            for some in _batches(records.good(), recipe.texts):
                for (place, split, record), found in zip(some, convert([record for *_, record in some]), strict=True):
                    if isinstance(found, str):
                        skipped.add(Problem(place, found))
                        skipped.check(total)
                        counts[split] -= 1
                        continue
                    writer.add(split, *found.columns)
                    twice = held_out.also_in(split, recipe.content(record))
                    for reason in (*found.notes, *(f"{split} holds it, and {other} too" for other in twice)):
                        noted.add(place, reason)
                bar.update(len(some))
            _check_counts(counts, inputs.sources)
            tallies = {"skipped": skipped.to_json(), "noted": noted.to_json()}
            return writer.finish(out, made_from=made_from, overrides=overrides, **tallies), True


def report(out: Path, prepare: Callable[[], tuple[ColumnStore, bool]], vocab_size: int | None = None) -> None:
    """Prints what `prepare` made in `out`. Raises DataError where the disk does not let it.

    vocab_size: of a tokenizer that is trained, as it was asked for
    """
    try:
        store, is_new = prepare()
    except OSError as error:  # a full disk, a folder that must not be written
        raise DataError(f"{out}: {error}: mend that and run the same command again") from error
    if not is_new:
        print(f"{out}: already prepared from the same files; nothing to do")
    print(f"{store.root}: {store.kind}, {store.vocab_size:,} tokens in the vocabulary")
    if vocab_size is not None and store.vocab_size < vocab_size:
        print(f"  --vocab-size {vocab_size:,}: the records give no more than {store.vocab_size:,}")
    for split, counted in store.entries.items():
        tokens = [f"{getattr(counted, f'{name}_tokens'):,}" for name in store.columns[store.kind]]
        print(f"  {split}: {counted.samples:,} records, {' + '.join(tokens)} tokens")
    for line in remarks(store.index):
        print(f"  {line}")


def report_example(
    arguments: argparse.Namespace, write: Callable[[Path], Mapping[str, int]], of_a_source: Sequence[str]
) -> None:
    """Prints which files `write` made, and how many records each has.

    of_a_source: arguments that mean nothing here. Raises ConfigError for one that is given.
    """
    if given := [name for name in of_a_source if getattr(arguments, name)]:
        flag = f"--{given[0].replace('_', '-')}"
        raise ConfigError(f"{flag}: goes with --source; --example writes records, which are prepared next")
    for name, count in write(arguments.out).items():
        print(f"{arguments.out / name}: {count:,} records")


def _placed(
    tokenizer: Tokenizer, records: Splits[_R], texts: Callable[[_R], Sequence[str]], folder: Path
) -> tuple[PreTrainedTokenizerFast, str | None]:
    """The tokenizer, whose files are now in `folder`, and what overrides them."""
    used = tokenizer.made(text for _, split, record in records.good() if split == "train" for text in texts(record))
    if tokenizer.folder is None:
        used.save_pretrained(folder)
    else:
        copy_tokenizer(used, tokenizer.folder, folder)
    tried = [text[:_TRIED_CHARACTERS] for *_, record in islice(records.good(), _TRIED) for text in texts(record)]
    same_tokens(used, load_tokenizer(folder), tried, tokenizer.folder or folder)
    return used, overridden(used, tokenizer.folder or folder, tried)


def _survey(
    records: Splits[_R], skipped: Skipped, sources: Sequence[Path], progress: bool
) -> tuple[Counter[str], HeldOut]:
    """Good records of each split; too many bad ones show here, before hours of tokenizing."""
    counts = Counter(dict.fromkeys(("train", "val", "test") if records.test_files else ("train", "val"), 0))
    held_out = HeldOut()
    for item in tqdm(records, desc="reading", unit=" records", disable=not progress):
        if isinstance(item, Problem):
            skipped.add(item)
        else:
            counts[item[1]] += 1
            held_out.add(item[1], records.content(item[2]))
    skipped.check(skipped.count + counts.total())
    _check_counts(counts, sources)
    return counts, held_out


def _batches(
    records: Iterator[tuple[Place, str, _R]], texts: Callable[[_R], Sequence[str]]
) -> Iterator[list[tuple[Place, str, _R]]]:
    some: list[tuple[Place, str, _R]] = []
    size = 0
    for item in records:
        some.append(item)
        size += sum(map(len, texts(item[2])))
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


def _digests(files: Sequence[Path]) -> list[list[str]]:
    """[[name, SHA-256], ...] in the order in which the files are read; where they lie is of no account."""
    return [[path.name, entry(path, follow=True)["sha256"]] for path in files]
