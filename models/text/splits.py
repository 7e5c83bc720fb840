"""Which records are trained on and which validate.

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
from typing import Any, Generic, Literal, TypeVar, get_args

from trunkline.models.text.sources import Place, Problem, read_records

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = get_args(Split)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Splits(Generic[_T]):
    """The records of `files` and then of `val_files`; `val_fraction` counts only where there are no `val_files`.

    record_of: see read_records
    content: what of a record decides its side
    """

    files: Sequence[Path]
    val_files: Sequence[Path]
    val_fraction: float
    record_of: Callable[[Any], _T]
    content: Callable[[_T], str]

    @property
    def has_val(self) -> bool:
        """Whether some records are meant for validation."""
        return bool(self.val_files) or self.val_fraction > 0

    def __iter__(self) -> Iterator[tuple[Place, Split, _T] | Problem]:
        fraction = 0.0 if self.val_files else self.val_fraction
        for item in read_records(self.files, self.record_of):
            if isinstance(item, Problem):
                yield item
            else:
                yield item[0], "val" if _share(self.content(item[1])) < fraction else "train", item[1]
        for item in read_records(self.val_files, self.record_of):
            yield item if isinstance(item, Problem) else (item[0], "val", item[1])

    def good(self) -> Iterator[tuple[Place, Split, _T]]:
        """Those that can be used."""
        return (item for item in self if not isinstance(item, Problem))


def _share(content: str) -> float:
    """A number from 0 to below 1, evenly spread over contents."""
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=6).digest(), "big") / 2**48
