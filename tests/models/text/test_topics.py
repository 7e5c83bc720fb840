from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from trunkline.engine.errors import DataError
from trunkline.models.text.topics import distinct, parted, topics, write_topics


@pytest.fixture(scope="module")
def parts() -> dict[str, dict[str, str]]:
    """Text by name of each part."""
    texts = distinct(topics())
    found = parted(texts)
    return {part: {name: texts[name] for name in texts if found[name] == part} for part in ("train", "val", "test")}


def pieces(text: str) -> set[bytes]:
    """All 48 bytes that follow one another."""
    data = text.encode()
    return {data[at : at + 48] for at in range(max(1, len(data) - 47))}


def test_no_text_shares_half_of_its_pieces_with_those_of_another_part(parts: dict[str, dict[str, str]]) -> None:
    held = {part: [pieces(text) for text in texts.values()] for part, texts in parts.items()}
    for part, others in (("test", ("train", "val")), ("val", ("train",))):
        known = set().union(*(found for other in others for found in held[other]))
        for found in held[part]:
            assert len(found & known) < len(found) / 2


def test_near_copies_are_there_before_they_are_left_out() -> None:
    everything = topics()
    left_out = everything.keys() - distinct(everything).keys()
    assert len(left_out) >= 10
    found = {name: pieces(text) for name, text in everything.items()}
    held_by = Counter(piece for held in found.values() for piece in held)
    for name in left_out:
        assert sum(held_by[piece] > 1 for piece in found[name]) >= len(found[name]) / 2


def test_the_longer_of_two_alike_stays_and_a_short_text_counts_as_one_piece() -> None:
    text = "".join(map(str, range(200)))
    assert distinct({"a": text[:100], "b": text, "c": "short", "d": "short"}) == {"b": text, "c": "short"}
    mostly = text[:70] + "x" * 80  # 23 of its 71 pieces are the other's
    assert distinct({"a": text, "b": mostly}) == {"a": text, "b": mostly}


def test_parts_are_disjoint_of_the_promised_size_and_the_same_on_each_call(parts: dict[str, dict[str, str]]) -> None:
    texts = distinct(topics())
    names = [name for part in parts.values() for name in part]
    assert sorted(names) == sorted(texts)
    assert parted(texts) == parted(dict(reversed(texts.items())))
    sizes = {part: sum(map(len, held.values())) for part, held in parts.items()}
    total = sum(sizes.values())
    for part in ("val", "test"):
        assert 0.1 <= sizes[part] / total < 0.15
        assert max(map(len, parts[part].values())) < total / 20
    assert max(texts.values(), key=len) in parts["train"].values()


def test_files_hold_each_part_and_are_never_written_over(tmp_path: Path, parts: dict[str, dict[str, str]]) -> None:
    counts = write_topics(tmp_path / "a" / "topics")
    assert counts == {f"{part}.jsonl": len(texts) for part, texts in parts.items()}
    for part, texts in parts.items():
        lines = (tmp_path / "a" / "topics" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [{"text": text} for text in texts.values()]
    with pytest.raises(DataError, match="choose another --out, or empty it"):
        write_topics(tmp_path / "a" / "topics")
