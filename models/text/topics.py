"""Python's own documentation of its language (pydoc_data.topics): English text that comes with every Python.

topics()           text by name
distinct(texts)    without those that stand mostly in others
parted(texts)      which are for training, for choices and for the test
write_topics(...)  these as files of records
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from trunkline.models.text.record_files import write_records

Part = Literal["train", "val", "test"]
_SHINGLE = 48  # bytes
_SHARED = 0.5


def topics() -> dict[str, str]:
    """Text by name, sorted; some 80 topics of 465 kB."""
    import pydoc_data.topics

    return {name: text.strip() for name, text in sorted(pydoc_data.topics.topics.items())}


def distinct(texts: Mapping[str, str]) -> dict[str, str]:
    """The texts, from the longest on, of which less than half of the 48-byte pieces stand in those before.

    The rest would make a test of memory: a topic often is a part of another, word by word.
    """
    kept: set[str] = set()
    seen: set[bytes] = set()
    for name in sorted(texts, key=lambda name: (-len(texts[name]), name)):
        data = texts[name].encode()
        pieces = {data[at : at + _SHINGLE] for at in range(max(1, len(data) - _SHINGLE + 1))}
        if len(pieces & seen) < _SHARED * len(pieces):
            kept.add(name)
            seen |= pieces
    return {name: text for name, text in texts.items() if name in kept}


def parted(texts: Mapping[str, str]) -> dict[str, Part]:
    """By name: a tenth of the text for the test, a tenth for choices ("val"), and the rest for training.

    Topics are taken by the digests of their names. One of more than a twentieth of all text is for training.
    """
    total = sum(map(len, texts.values()))
    parts: dict[str, Part] = dict.fromkeys(texts, "train")
    held = {"test": 0, "val": 0}
    for name in sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest()):
        part: Part = "test" if held["test"] < total / 10 else "val"
        if len(texts[name]) < total / 20 and held[part] < total / 10:
            parts[name] = part
            held[part] += len(texts[name])
    return parts


def write_topics(folder: Path) -> dict[str, int]:
    """Write {train,val,test}.jsonl of {"text": ...}, all or none, and return how many records each has.

    Raises DataError if `folder` is there and not empty.
    """
    texts = distinct(topics())
    parts = parted(texts)
    names: tuple[Part, ...] = ("train", "val", "test")
    return write_records(
        folder,
        {f"{part}.jsonl": [{"text": texts[name]} for name in texts if parts[name] == part] for part in names},
    )
