"""A file of answers.

answers_file(path, prompts)   open for writing, unless it is the file that the prompts are from
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from trunkline.engine.errors import DataError


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
