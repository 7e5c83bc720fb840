"""The example of spelled-out numbers: its files, its splits and its typing errors."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
from pathlib import Path

import pytest

from trunkline.engine.errors import ConfigError
from trunkline.launchers.prepare import main
from trunkline.models.seq2seq import example
from trunkline.models.seq2seq.example import (
    LANGUAGES,
    held_out_records,
    split_of,
    train_records,
    with_typo,
    without_accents,
    write_numbers,
)  # fmt: skip

spells = pytest.mark.skipif(importlib.util.find_spec("num2words") is None, reason="num2words is not installed")


def one_edit_apart(one: str, other: str) -> bool:
    """Whether one letter was left out, added or changed, or two neighbours were swapped."""
    start = len([1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other))])
    a, b = one[start:], other[start:]
    return one != other and (a[1:] == b or a == b[1:] or a[1:] == b[1:] or (a[2:] == b[2:] and a[:2] == b[1::-1]))


def test_an_edit_is_told_from_none_and_from_two() -> None:
    assert all(one_edit_apart("zehn", typed) for typed in ("ehn", "zeh", "zzehn", "zehna", "zahn", "zhen", "ezhn"))
    assert not any(one_edit_apart("zehn", typed) for typed in ("zehn", "ehz", "zaht", "z", "nzehx", "hezn"))


def test_a_typing_error_is_one_edit_and_each_kind_occurs() -> None:
    draw = random.Random(0)
    typed = [with_typo("eighteen", draw) for _ in range(400)]
    assert all(one_edit_apart("eighteen", each) for each in typed)
    assert {len(each) for each in typed} == {7, 8, 9}
    assert any(sorted(each) == sorted("eighteen") for each in typed)
    assert all(one_edit_apart("ee", with_typo("ee", draw)) for _ in range(40))


def test_accents_go_and_letters_stay() -> None:
    assert without_accents("fünfundvierzig zéro trois três honderdéén två") == (
        "funfundvierzig zero trois tres honderdeen tva"
    )
    assert without_accents("søn og strøm") == "søn og strøm"


def test_one_number_in_ten_is_held_out_in_two_halves() -> None:
    held = [n for n in range(101, 1_000_000) if (n * 2654435761 % 2**32) // 7 % 10 == 0]
    splits = [split_of(n) for n in held]
    assert set(splits) == {"val", "test"}
    assert len(held) == pytest.approx(99_990, rel=0.002)
    assert splits.count("val") == pytest.approx(len(held) / 2, rel=0.002)
    held_out = set(held)
    assert all(split_of(n) == "train" for n in range(2000) if n not in held_out)


@spells
@pytest.mark.parametrize("language", [*LANGUAGES, "sv"])
def test_no_number_of_one_split_stands_in_another(language: str) -> None:
    train = {r["response"] for r in train_records(language, 300)}
    val, test = ({r["response"] for r in held_out_records(language, split, 60)} for split in ("val", "test"))
    assert len(val) == len(test) == 60  # none stands twice
    assert not train & val
    assert not train & test
    assert not val & test


@spells
def test_held_out_prompts_have_one_error_and_training_prompts_sometimes() -> None:
    held = [*held_out_records("de", "test", 50), *held_out_records("fr", "val", 50)]
    assert all(one_edit_apart(r["clean"], r["prompt"]) for r in held)
    train = list(train_records("pt", 2000))
    changed = [r for r in train if r["prompt"] != r["clean"]]
    bare = [r for r in changed if r["prompt"] == without_accents(r["clean"])]
    assert 0.40 < (len(changed) - len(bare)) / len(train) < 0.48  # 7 of 16
    assert all(one_edit_apart(r["clean"], r["prompt"]) for r in changed if r not in bare)
    assert 0.005 < len(bare) / len(train) < 0.04  # 1 of 16, of those that have any


@spells
def test_words_are_lower_case_and_without_commas() -> None:
    records = [*train_records("en", 200), *held_out_records("en", "test", 20)]
    assert not any("," in r["clean"] or r["clean"] != r["clean"].lower() for r in records)
    one = list(train_records("sv", 0, first=2))[1]
    assert (one["clean"], one["response"], one["language"]) == ("ett", "1", "sv")
    assert [r["clean"] for r in train_records("de", 0, first=22)][-1] == "einundzwanzig"


@spells
def test_the_files_are_the_same_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in (("TRAIN", 20), ("VAL", 4), ("TEST", 5), ("NEW_TRAIN", 6), ("NEW_COPIES", 2)):
        monkeypatch.setattr(example, name, count)
    out = tmp_path / "numbers"
    assert main(["seq2seq", "--example", "numbers", "--out", str(out)]) == 0
    assert f"{out / 'train.jsonl'}: 160 records" in capsys.readouterr().out
    counts = write_numbers(tmp_path / "again")
    assert counts == {
        "train.jsonl": 160, "val.jsonl": 32, "test.jsonl": 40, "sv-train.jsonl": 212, "sv-val.jsonl": 4,
        "sv-test.jsonl": 5,
    }  # fmt: skip
    for name, count in counts.items():
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        records = [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]
        assert len(records) == count
        assert {r["language"] for r in records} == ({"sv"} if name.startswith("sv") else set(LANGUAGES))
    assert main(["seq2seq", "--example", "numbers", "--out", str(out)]) == 2


@spells
def test_the_first_draws_are_those_of_the_measured_figures() -> None:
    """Of num2words 0.5.14: other draws are another data set, and the figures in the documents are of this one."""
    assert [r["prompt"] for r in train_records("en", 6)] == [
        "seven thousand seven hundred ani twenty-six", "ecghteen", "two",
        "sixtw-one thousand five hundred and fifty-two", "thirty-to", "nine",
    ]  # fmt: skip


@pytest.mark.parametrize("flag", ["--train-tokenizer", "--val-source x"])
def test_flags_of_a_source_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert main(["seq2seq", "--example", "numbers", "--out", str(tmp_path / "n"), *flag.split()]) == 2
    assert f"{flag.split()[0]}: goes with --source" in capsys.readouterr().err


def test_a_source_needs_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["seq2seq", "--source", str(tmp_path), "--out", str(tmp_path / "n")]) == 2
    assert "needs --tokenizer FOLDER or --train-tokenizer" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("num2words") is not None, reason="num2words is installed")
def test_without_num2words_it_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pip install -c constraints\.txt num2words"):
        write_numbers(tmp_path / "numbers")
