"""From files of texts, or of prompts and answers, to a prepared store of tokens.

    run(arguments)               `python launchers/prepare.py token_image ...`
    prepare(sources, out, ...)   read, check, tokenize and store every record; see trunkline.models.text.preparation

What is stored is the only tokenization: images, masks and lengths all come from it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trunkline.engine.errors import ConfigError
from trunkline.models.text.bpe import check_size, train_tokenizer
from trunkline.models.text.byte_tokenizer import plain_bytes
from trunkline.models.text.preparation import Recipe, Tokenizer, find_inputs, from_folder, prepare_store, report
from trunkline.models.text.preparation_flags import DEFAULT_VAL_FRACTION, DEFAULT_VOCAB_SIZE
from trunkline.models.text.topics import write_topics
from trunkline.models.token_image.conversion import Converter
from trunkline.models.token_image.records import Kind, content, record_of, texts
from trunkline.models.token_image.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SUFFIXES = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt")


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line says. Raises ConfigError and DataError."""
    if arguments.example:
        _write_example(arguments)
        return
    if not (arguments.tokenizer or arguments.train_tokenizer or arguments.byte_tokenizer):
        raise ConfigError("--source: needs --tokenizer FOLDER, --train-tokenizer or --byte-tokenizer")
    if arguments.vocab_size is not None and not arguments.train_tokenizer:
        raise ConfigError("--vocab-size: goes with --train-tokenizer; any other tokenizer has its own")
    vocab_size = DEFAULT_VOCAB_SIZE if arguments.vocab_size is None else arguments.vocab_size
    prepared = partial(
        prepare, arguments.source, arguments.out, kind=arguments.kind,
        tokenizer="bytes" if arguments.byte_tokenizer else arguments.tokenizer, vocab_size=vocab_size,
        use_chat_template=arguments.use_chat_template, val_sources=arguments.val_source or [],
        test_sources=arguments.test_source or [],
        val_fraction=DEFAULT_VAL_FRACTION if arguments.val_fraction is None else arguments.val_fraction,
        max_bad_fraction=arguments.max_bad_fraction, progress=True,
    )  # fmt: skip
    report(arguments.out, prepared, vocab_size if arguments.train_tokenizer else None)


_OF_A_SOURCE = (
    "tokenizer", "train_tokenizer", "byte_tokenizer", "vocab_size", "use_chat_template", "val_source", "test_source",
    "val_fraction",
)  # fmt: skip


def _write_example(arguments: argparse.Namespace) -> None:
    if given := [name for name in _OF_A_SOURCE if getattr(arguments, name)]:
        flag = f"--{given[0].replace('_', '-')}"
        raise ConfigError(f"{flag}: goes with --source; --example writes records, which are prepared next")
    for name, count in write_topics(arguments.out).items():
        print(f"{arguments.out / name}: {count:,} records")


def prepare(
    sources: Sequence[Path], out: Path, *, kind: Kind = "texts", tokenizer: Path | Literal["bytes"] | None = None,
    vocab_size: int = DEFAULT_VOCAB_SIZE, use_chat_template: bool = False, val_sources: Sequence[Path] = (),
    test_sources: Sequence[Path] = (), val_fraction: float = DEFAULT_VAL_FRACTION, max_bad_fraction: float = 0.1,
    progress: bool = False,
) -> tuple[Store, bool]:  # fmt: skip
    """Prepare the records of `sources` as a store in `out`; returns it, and whether there was anything to do.

    tokenizer: the folder of one, or "bytes"; without, one of `vocab_size` tokens is trained on the split "train"
    use_chat_template: write a prompt and its answer as the tokenizer's chat template does
    val_fraction: share of the records that becomes the split "val", chosen by their content, so that equal records lie
        on the same side; of no account where there are `val_sources`

    Raises ConfigError for settings that cannot be, and for an `out` that holds something else. Raises DataError for
    files that cannot be read, for more bad records than `max_bad_fraction` of all, and for a split left empty.
    """
    if use_chat_template and kind == "dialogues":
        raise ConfigError("--use-chat-template: goes with --kind texts; a dialogue's prompt is no part of its text")
    if use_chat_template and not isinstance(tokenizer, Path):
        raise ConfigError("--use-chat-template: goes with --tokenizer FOLDER, whose chat template it is")
    inputs = find_inputs(
        sources, SUFFIXES, out, val_sources=val_sources, test_sources=test_sources, val_fraction=val_fraction,
        max_bad_fraction=max_bad_fraction,
    )  # fmt: skip
    if tokenizer is None:
        check_size(vocab_size)
        used = Tokenizer(partial(train_tokenizer, vocab_size=vocab_size), vocab_size)
    elif tokenizer == "bytes":
        used = Tokenizer(lambda _: plain_bytes(), "bytes")
    else:
        used = from_folder(Path(tokenizer), _check_template if use_chat_template else None)
    converter = partial(Converter, kind=kind, template=f"{tokenizer}: the chat template" if use_chat_template else None)
    recipe = Recipe(
        Store, kind, record_of, content, texts, converter, {"chat template": use_chat_template},
        text_lines=True,
    )  # fmt: skip
    return prepare_store(inputs, recipe, used, out, progress=progress)


def _check_template(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        raise ConfigError(
            f"{folder}: the tokenizer has no chat template, or several and no default: add a chat_template.jinja, or "
            "leave out --use-chat-template"
        ) from error
