"""Which records are trained on and which validate.

    Splits(files, val_files, kind, val_fraction)   (place, split, record) or Problem; iterate as often as you like
    .good()                                        without the problems

Without files of their own, validation records are chosen by their content: equal records lie on the same side, and a
record stays on its side however many others there are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trunkline.models.causal_lm.records import Kind, Record, Text
from trunkline.models.causal_lm.sources import Place, Problem, read_records
from trunkline.models.causal_lm.store import Split


@dataclass(frozen=True)
class Splits:
    """The records of `files` and then of `val_files`; `val_fraction` counts only where there are no `val_files`."""

    files: Sequence[Path]
    val_files: Sequence[Path]
    kind: Kind
    val_fraction: float

    @property
    def has_val(self) -> bool:
        """Whether some records are meant for validation."""
        return bool(self.val_files) or self.val_fraction > 0

    def __iter__(self) -> Iterator[tuple[Place, Split, Record] | Problem]:
        fraction = 0.0 if self.val_files else self.val_fraction
        for item in read_records(self.files, self.kind):
            if isinstance(item, Problem):
                yield item
            else:
                yield item[0], "val" if _share(item[1]) < fraction else "train", item[1]
        for item in read_records(self.val_files, self.kind):
            yield item if isinstance(item, Problem) else (item[0], "val", item[1])

    def good(self) -> Iterator[tuple[Place, Split, Record]]:
        """Those that can be used."""
        return (item for item in self if not isinstance(item, Problem))


def _share(record: Record) -> float:
    """A number from 0 to below 1, evenly spread over records and the same for those of equal texts and messages."""
    messages = {name: value for name, value in vars(record).items() if name not in ("tools", "notes")}
    content = record.text if isinstance(record, Text) else json.dumps(messages, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=6).digest(), "big") / 2**48
