"""Whether records that are held out stand among those that are trained on, too.

    HeldOut()    .add(split, content) of all records; then .also_in(split, content) of each

It holds 8 bytes for each record of "val" and "test".
"""

from __future__ import annotations

import hashlib
from array import array

import numpy as np

_LATER = {"train": ("val", "test"), "val": ("test",), "test": ()}


class HeldOut:
    """Knows records by a digest of what they say."""

    def __init__(self) -> None:
        self._added = {"val": array("Q"), "test": array("Q")}
        self._sorted: dict[str, np.ndarray] = {}

    def add(self, split: str, content: str) -> None:
        """Note a record of this split, before `also_in` is asked for any."""
        assert not self._sorted
        if split in self._added:
            self._added[split].append(_digest(content))

    def also_in(self, split: str, content: str) -> list[str]:
        """Those of "val" and "test" that hold this record of `split`; each two splits are told of once."""
        if not self._sorted:
            self._sorted = {name: np.unique(np.frombuffer(added, np.uint64)) for name, added in self._added.items()}
        return [name for name in _LATER[split] if self._holds(name, np.uint64(_digest(content)))]

    def _holds(self, split: str, digest: np.uint64) -> bool:
        held = self._sorted[split]
        place = np.searchsorted(held, digest)
        return bool(place < len(held) and held[place] == digest)


def _digest(content: str) -> int:
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big")
