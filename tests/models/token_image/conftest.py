"""Small prepared data sets, in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from trunkline.models.text.byte_tokenizer import plain_bytes
from trunkline.models.text.column_store import ColumnWriter
from trunkline.models.token_image.records import Kind
from trunkline.models.token_image.store import Store

TEXTS = [
    "a gas network",
    "b" * 40,
    "the pressure falls along a pipe. " * 12,
    "x",
    "",
    "compressors raise it again " * 3,
]


def make_store(folder: Path, kind: Kind = "texts") -> Store:
    """TEXTS as the splits "train" and "val"; of dialogues each has the one before it as its condition."""
    return write_store(folder, kind, [(text.encode(), before.encode()) for text, before in zip(TEXTS, ["", *TEXTS])])


def write_store(folder: Path, kind: Kind, records: Sequence[tuple[bytes, bytes]]) -> Store:
    """Texts and their conditions as the splits "train" and "val"."""
    (draft := folder / "draft").mkdir(parents=True)
    plain_bytes().save_pretrained(draft / "tokenizer")
    with ColumnWriter(draft, Store, kind, 256, ["train", "val"]) as writer:
        for split in ("train", "val"):
            for text, before in records:
                writer.add(split, list(text), *([list(before)] if kind == "dialogues" else []))
        return writer.finish(folder / "store")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("texts")).root


@pytest.fixture(scope="session")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("dialogues"), "dialogues").root
