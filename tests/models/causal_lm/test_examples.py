from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from trunkline.models.causal_lm.examples import write_examples
from trunkline.models.causal_lm.records import KINDS, record_of
from trunkline.models.text.sources import Problem, read_records


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example")
    counts = write_examples(folder)
    assert counts == {path.name: len(path.read_text().splitlines()) for path in folder.iterdir()}
    return folder


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def plain(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.casefold()).strip() or text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["", "-val"])
def test_every_record_of_the_example_can_be_used(folder: Path, kind: Any, suffix: str) -> None:
    items = list(read_records([folder / f"{kind}{suffix}.jsonl"], lambda value: record_of(value, kind)))
    assert not [item for item in items if isinstance(item, Problem)]
    assert len(items) >= 10


def test_no_text_question_or_answer_of_validation_stands_in_training(folder: Path) -> None:
    train, val = (
        {plain(text) for r in records(folder / f"conversations{suffix}.jsonl") for text in r.values()}
        for suffix in ("", "-val")
    )
    assert not train & val
    for kind in ("text", "preferences"):
        one, other = ({t for r in records(folder / f"{kind}{s}.jsonl") for t in r.values()} for s in ("", "-val"))
        assert not one & other


def test_no_exchange_stands_twice(folder: Path) -> None:
    pairs = [
        (plain(r["prompt"]), plain(r["response"]))
        for suffix in ("", "-val")
        for r in records(folder / f"conversations{suffix}.jsonl")
    ]
    assert len(set(pairs)) == len(pairs) > 800


@pytest.mark.parametrize("suffix", ["", "-val"])
def test_a_rejected_answer_answers_another_question(folder: Path, suffix: str) -> None:
    answers: dict[str, set[str]] = {}
    for record in records(folder / f"conversations{suffix}.jsonl"):
        answers.setdefault(plain(record["prompt"]), set()).add(plain(record["response"]))
    preferences = records(folder / f"preferences{suffix}.jsonl")
    for record in preferences:
        right = answers[plain(record["prompt"])]
        assert plain(record["chosen"]) in right
        assert plain(record["rejected"]) not in right
        assert plain(record["rejected"]) in set().union(*answers.values())
    # a rejected answer must not be told by itself: nearly every answer is chosen once and rejected once
    assert len({record["rejected"] for record in preferences}) > 0.8 * len(preferences)


def test_writing_again_changes_nothing(folder: Path) -> None:
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    write_examples(folder)
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before
