"""Which records are trained on, which validate and which are for the test.

    Splits(files, val_files, ...)                  (place, split, record) or Problem; iterate as often as you like
    .good()                                        without the problems

Without files of their own, validation records are chosen by their content: equal records lie on the same side, and a
record stays on its side however many others there are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from trunkline.models.text.sources import Place, Problem, read_records

Split = Literal["train", "val", "test"]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Splits(Generic[_T]):
    """The records of `files`, then of `val_files` and of `test_files`.

    val_fraction: counts only where there are no `val_files`
    record_of: see read_records
    content: what of a record decides its side
    text_lines: see read_records
    """

    files: Sequence[Path]
    val_files: Sequence[Path]
    val_fraction: float
    record_of: Callable[[Any], _T]
    content: Callable[[_T], str]
    test_files: Sequence[Path] = ()
    text_lines: bool = False

    @property
    def has_val(self) -> bool:
        """Whether some records are meant for validation."""
        return bool(self.val_files) or self.val_fraction > 0

    def __iter__(self) -> Iterator[tuple[Place, Split, _T] | Problem]:
        fraction = 0.0 if self.val_files else self.val_fraction
        for item in self._read(self.files):
            if isinstance(item, Problem):
                yield item
            else:
                yield item[0], "val" if _share(self.content(item[1])) < fraction else "train", item[1]
        held_out: tuple[tuple[Split, Sequence[Path]], ...] = (("val", self.val_files), ("test", self.test_files))
        for split, files in held_out:
            for item in self._read(files):
                yield item if isinstance(item, Problem) else (item[0], split, item[1])

    def good(self) -> Iterator[tuple[Place, Split, _T]]:
        """Those that can be used."""
        return (item for item in self if not isinstance(item, Problem))

    def _read(self, files: Sequence[Path]) -> Iterator[tuple[Place, _T] | Problem]:
        return read_records(files, self.record_of, text_lines=self.text_lines)


def _share(content: str) -> float:
    """A number from 0 to below 1, evenly spread over contents."""
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=6).digest(), "big") / 2**48
