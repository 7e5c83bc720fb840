"""Prompts from a file, and answers into one.

prompt_lines(path)                   a prompt a line
warn_of_unknown(tokenizer, prompts)  says how many of them the model cannot read
answers_file(path, prompts)          open for writing, unless it is the file that the prompts are from
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
    if lines[-1] == "":
        del lines[-1]
    if blank := [number for number, line in enumerate(lines, 1) if not line.strip()]:
        print(
            f"note: --prompts {path}: blank lines get no answer: {len(blank):,}, the first is line {blank[0]:,}",
            file=sys.stderr,
        )
    return [line for line in lines if line.strip()]


def warn_of_unknown(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Sequence[str]]) -> None:
    """Says on stderr how many prompts have a turn with what the tokenizer does not know, or drops whole.

    prompts: the turns of each
    """
    unknown = {tokenizer.unk_token_id} - {None, tokenizer.eos_token_id, tokenizer.bos_token_id}
    encode = tokenizer.backend_tokenizer.encode_batch_fast
    if found := [
        number
        for number, turns in enumerate(prompts, 1)
        if any(not (of.ids and unknown.isdisjoint(of.ids)) for of in encode(list(turns), add_special_tokens=False))
    ]:
        print(
            f"warning: {len(found):,} of {len(prompts):,} prompts hold what the tokenizer does not know, and the model "
            f"cannot read; the first is prompt {found[0]:,}",
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
