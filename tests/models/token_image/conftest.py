"""Small prepared data sets, in bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from torch import Tensor

from tests.models.token_image.toy_run import LEARNABLE, SMALL, train
from trunkline.models.text.byte_tokenizer import plain_bytes
from trunkline.models.text.column_store import ColumnWriter
from trunkline.models.token_image import evaluation, information, task
from trunkline.models.token_image.encodings import Encoding
from trunkline.models.token_image.information import Curve
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


def make_store(folder: Path, kind: Kind = "texts", vocab_size: int = 256) -> Store:
    """TEXTS as the splits "train" and "val"; of dialogues each has the one before it as its condition."""
    records = [(text.encode(), before.encode()) for text, before in zip(TEXTS, ["", *TEXTS])]
    return write_store(folder, kind, records, vocab_size)


def write_store(folder: Path, kind: Kind, records: Sequence[tuple[bytes, bytes]], vocab_size: int = 256) -> Store:
    """Texts and their conditions as the splits "train" and "val"."""
    (draft := folder / "draft").mkdir(parents=True)
    plain_bytes().save_pretrained(draft / "tokenizer")
    with ColumnWriter(draft, Store, kind, vocab_size, ["train", "val"]) as writer:
        for split in ("train", "val"):
            for text, before in records:
                writer.add(split, list(text), *([list(before)] if kind == "dialogues" else []))
        return writer.finish(folder / "store")


@pytest.fixture(scope="session", autouse=True)
def curves_are_made_once() -> Iterator[None]:
    """They are a pure function of codes and frequencies, and take a second each."""
    made: dict[tuple[Encoding, bytes], Curve] = {}

    def once(encoding: Encoding, frequencies: Tensor) -> Curve:
        key = (encoding, frequencies.numpy().tobytes())
        if key not in made:
            made[key] = information.curve_of(encoding, frequencies)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        for user in (task, evaluation):
            patch.setattr(user, "curve_of", once)
        yield


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("texts")).root


@pytest.fixture(scope="session")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("dialogues"), "dialogues").root


@pytest.fixture(scope="session")
def learnable_run(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("learnable"), texts, LEARNABLE)


@pytest.fixture(scope="session")
def dialogue_run(dialogues: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("dialogue"), dialogues, SMALL, data={"encoding": "rgb", "stride": None})
