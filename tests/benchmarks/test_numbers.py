"""The comparison on spelled-out numbers: its parts on answers made by hand, and the whole of it on a few records."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from trunkline.benchmarks.numbers import TUNED, baselines, by_language, by_method, counts, nearest, right, rules, wrong
from trunkline.launchers import bench, prepare, train
from trunkline.models.seq2seq import example
from trunkline.models.seq2seq.example import LANGUAGES, Record

ROOT = Path(__file__).parents[2]
spells = pytest.mark.skipif(importlib.util.find_spec("num2words") is None, reason="num2words is not installed")
knows_rules = pytest.mark.skipif(importlib.util.find_spec("text_to_num") is None, reason="text2num is not installed")


def record(prompt: str, response: str, language: str = "en", clean: str | None = None) -> Record:
    return {"prompt": prompt, "response": response, "clean": clean or prompt, "language": language}


PAIRS = [("one", "1"), ("two", "2"), ("twenty", "20"), ("twenty one", "21"), ("uno", "1")]


def test_simple_answers_are_those_of_the_records() -> None:
    answers = baselines(PAIRS * 9, PAIRS * 9)
    assert answers["most frequent answer"](["two", "?"]) == ["1", "1"]
    assert answers["copy"](["two", "?"]) == ["two", "?"]
    assert answers["nearest neighbour"](["twenty onw", "unoo"]) == ["21", "1"]
    assert answers["word-context table"](["two"]) == answers["letter-context table"](["two"]) == ["2"]


def test_the_nearest_is_sought_in_what_is_given_for_it() -> None:
    assert nearest(PAIRS[:3])(["twenty one"]) == ["20"]


@knows_rules
def test_the_rules_are_told_the_language_and_say_nothing_to_an_error() -> None:
    answer = rules(["de", "fr", "en", "en"])
    assert answer(["dreiundvierzig", "quatre-vingt-un", "quatre-vingt-un", "fortyy"]) == ["43", "81", "", ""]


RECORDS = [record("one", "1"), record("two", "2"), record("uno", "1", "es"), record("tress", "3", "es", "tres")]
GIVEN = {"clean": ["1", "2", "1", "3"], "one error": ["1", "20", "7", "3"]}


def test_right_answers_are_counted_by_language() -> None:
    assert right(GIVEN["one error"], RECORDS) == (2, 4)
    assert right(GIVEN["one error"], RECORDS, "en") == (1, 2)
    assert counts({"x": GIVEN}, RECORDS) == {
        "x": {"en": {"clean": (2, 2), "one error": (1, 2)}, "es": {"clean": (2, 2), "one error": (1, 2)}}
    }


def test_the_table_has_intervals_by_wilson() -> None:
    assert by_method({"x": GIVEN}, RECORDS).splitlines()[2] == "| x | 100.0 % (51.0 to 100.0) | 50.0 % (15.0 to 85.0) |"


def test_the_table_by_language_leaves_out_who_knows_nothing() -> None:
    records = [record("x", "1", language) for language in LANGUAGES]
    ones, none = ({how: [answer] * 8 for how in ("clean", "one error")} for answer in ("1", ""))
    lines = by_language({"a": ones, "b": none}, {"tuned": none}, records).splitlines()
    assert lines[0] == "|  | a | tuned |"
    assert lines[2] == "| en | 100.0, 100.0 | 0.0 |"
    assert len(lines) == 2 + len(LANGUAGES)


@spells
def test_wrong_answers_are_shown_with_what_can_be_said_of_them() -> None:
    records = [record("tow", "2"), record("six", "6"), record("sixty two", "61"), record("sixty", "6", clean="six")]
    said, table = wrong(["10", "6", "62", "60"], records)
    assert "Of 3 wrong answers of the network, 1 are wrong in one digit alone. 1 are the number that was typed" in said
    lines = table.splitlines()[2:]
    assert lines == ["| tow (en) | 2 | 10 |", "| sixty two (en) | 61 | 62 |", "| sixty (en) | 6 | 60 |"]
    assert wrong(["2"], records[:1]) == []


@spells
@knows_rules
def test_the_demo_from_its_records_to_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in (("TRAIN", 40), ("VAL", 2), ("TEST", 3), ("NEW_TRAIN", 6), ("NEW_COPIES", 2)):
        monkeypatch.setattr(example, name, count)
    monkeypatch.chdir(tmp_path)
    data = "data/seq2seq-demo"
    assert prepare.main(["seq2seq", "--example", "numbers", "--out", f"{data}/numbers"]) == 0
    trained = ["--train-tokenizer", "--vocab-size", "512", "--max-token-length", "12"]
    for store, mark, tokenizer in (("pairs", "", trained), ("sv", "sv-", ["--tokenizer", f"{data}/pairs/tokenizer"])):
        train_, val, test = (f"{data}/numbers/{mark}{split}.jsonl" for split in ("train", "val", "test"))
        files = ["--source", train_, "--val-source", val, "--test-source", test]
        assert prepare.main(["seq2seq", *files, *tokenizer, "--out", f"{data}/{store}"]) == 0
    runs = Path("runs/seq2seq-demo")
    short = ["--set", "training.steps=1", "--set", "deepspeed.scheduler.params.warmup=0"]
    config = str(ROOT / "configs/seq2seq/demo.json")
    assert train.main(["--config", config, "--output-dir", str(runs / "pretrained"), *short]) == 0
    frozen = 'training.parameters=[{"names": ["lm.shared.*", "lm.encoder.*"], "frozen": true}]'
    capsys.readouterr()
    assert train.main(["--config", str(ROOT / "configs/seq2seq/demo-sv.json"), "--set", frozen, "--plan"]) == 0
    assert "1,017,856 parameters, 459,776 of them trained" in capsys.readouterr().out
    for tuned in TUNED.values():
        shutil.copytree(runs / "pretrained", runs / tuned)
    assert bench.main(["numbers"]) == 0
    out = runs / "numbers"
    table = capsys.readouterr().out
    assert "24 numbers in eight languages, none of which stands in the 320 training records" in table
    assert "3 numbers in Swedish, learnt from 300 pairs" in table
    found = json.loads((out / "numbers.json").read_text())
    assert found["eight languages"]["text2num, told the language"]["en"]["clean"] == [3, 3]
    assert found["eight languages"]["nearest neighbour"]["de"] == {"clean": [0, 3], "one error": [0, 3]}
    assert set(found["Swedish"]) >= {"whole", "frozen", "from scratch", "not fine-tuned", "copy"}
    assert found["Swedish"]["whole"] == found["Swedish"]["frozen"]
    assert (out / "numbers.png").stat().st_size > 1000
    assert table.split("\n\nwrote")[0] in (out / "numbers.md").read_text()


def test_other_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}\n')
    for folder, fault in ((tmp_path, "not the example's records"), (tmp_path / "none", "is missing: make it with `")):
        assert bench.main(["numbers", "--example", str(folder), "--runs", str(tmp_path)]) == 2
        assert f"{folder / 'train.jsonl'}: {fault}" in capsys.readouterr().err
