"""Prompts from a file, and answers into one.

prompt_lines(path)                 a prompt a line
warn_of_unknown(tokenizer, texts)  says how many of them the model cannot read
answers_file(path, prompts)        open for writing, unless it is the file that the prompts are from
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from trunkline.engine.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def prompt_lines(path: str | Path) -> list[str]:
    """The lines of a file, or of standard input (-), but for blank ones, which are counted on stderr.

    Raises DataError.
    """
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()
        # of the marks that Unicode has for the end of a line, only those of files: the others stand within a text
        lines = data.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts {path}: cannot be read as UTF-8 text: {error}") from error
    prompts = [line for line in lines if line.strip()]
    if blank := len(lines) - (lines[-1] == "") - len(prompts):
        print(f"note: --prompts {path}: {blank:,} lines are blank and get no answer", file=sys.stderr)
    return prompts


def warn_of_unknown(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> None:
    """Says on stderr how many texts hold what the tokenizer does not know, or drops whole."""
    unknown = {tokenizer.unk_token_id} - {None, tokenizer.eos_token_id, tokenizer.bos_token_id}
    tokens = tokenizer.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    if found := sum(not (of.ids and unknown.isdisjoint(of.ids)) for of in tokens):
        print(
            f"warning: {found:,} of {len(texts):,} prompts hold what the tokenizer does not know, and the model cannot "
            "read",
            file=sys.stderr,
        )


@contextmanager
def answers_file(path: Path, prompts: str | Path | None) -> Iterator[TextIO]:
    """Raises DataError for one that cannot be written, or that would take the place of `prompts`."""
    if prompts is not None and os.path.exists(prompts) and os.path.exists(path) and os.path.samefile(prompts, path):
        raise DataError(f"--out {path}: is the file of --prompts, which would be overwritten: choose another")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            yield file
    except OSError as error:
        raise DataError(f"--out {path}: cannot be written: {error.strerror}; choose another") from error
