from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.models.seq2seq.toy_data import write_lines
from trunkline.engine.errors import ConfigError, DataError
from trunkline.launchers import prepare as launcher
from trunkline.models.seq2seq.config import Seq2SeqData
from trunkline.models.seq2seq.data import PairSamples
from trunkline.models.seq2seq.prepare import prepare
from trunkline.models.seq2seq.records import pair_of
from trunkline.models.seq2seq.store import Store
from trunkline.models.text import sources
from trunkline.models.text.tokenizer import load_tokenizer

SMALL = 358
"""The smallest vocabulary: bytes, marks and sentinels."""
GOOD = {"prompt": "what is it?", "response": "a pipe"}
RECORDS = [{"prompt": f"what is {number}?", "response": f"a number, {number}"} for number in range(60)]


def texts_of(store: Store, split: str) -> list[tuple[str, str]]:
    tokenizer, sides = store.tokenizer(), (store.column(split, "input"), store.column(split, "target"))
    return [tuple(tokenizer.decode(side.tokens(i)) for side in sides) for i in range(len(sides[0]))]  # type: ignore[misc]


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("source") / "pairs.jsonl", *RECORDS)


def t5_tokenizer(folder: Path, **changes: Any) -> Path:
    """A tokenizer of T5's own class, which adds EOS to every text by itself."""
    from transformers import T5TokenizerFast

    words = ["▁", "▁what", "▁is", "▁it", "?", "▁a", "▁pipe", "▁number", ",", *"0123456789", *"abcdefgh"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -1.0 - len(word) / 9) for word in words)]
    tokenizer: Any = T5TokenizerFast(vocab=pieces, extra_ids=100)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | changes
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_quotes_of_tsv_are_text_and_long_cells_are_read(tmp_path: Path) -> None:
    rows = [('"unbalanced one', "a"), ("two", "b"), ('"Hi" he said', "x" * 200_000)]
    for suffix, mark in ((".tsv", "\t"), (".csv", ",")):
        path = tmp_path / f"t{suffix}"
        quoted = [[f'"{cell.replace(chr(34), chr(34) * 2)}"' if mark == "," else cell for cell in row] for row in rows]
        path.write_text("\n".join(mark.join(row) for row in [["prompt", "response"], *quoted]) + "\n")
        found = [item[1] for item in sources.read_records([path], pair_of) if isinstance(item, tuple)]
        assert [(record.turns[-1], record.response) for record in found] == rows


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".json", ".csv", ".tsv"])
def test_every_format_becomes_the_same_store(source: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"pairs{suffix}"
    frame = pl.DataFrame(RECORDS)
    if suffix == ".parquet":
        frame.write_parquet(path)
    elif suffix == ".jsonl":
        shutil.copy(source, path)
    elif suffix == ".json":
        path.write_text(json.dumps(RECORDS))
    else:
        frame.write_csv(path, separator="," if suffix == ".csv" else "\t")
    store, is_new = prepare([path], tmp_path / "store", vocab_size=SMALL, val_fraction=0.2)
    assert is_new
    store.verify()
    train, val = texts_of(store, "train"), texts_of(store, "val")
    assert sorted(train + val) == sorted((record["prompt"], record["response"]) for record in RECORDS)
    assert 4 < len(val) < 25
    expected, _ = prepare([source], tmp_path / "expected", vocab_size=SMALL, val_fraction=0.2)
    assert store.arrays == expected.arrays


def test_history_becomes_turns_with_eos_between_them(tmp_path: Path) -> None:
    talk = GOOD | {"history": [["hello", "good day"]]}
    path = write_lines(tmp_path / "t.jsonl", talk, GOOD)
    store, _ = prepare([path], tmp_path / "s", vocab_size=SMALL, val_sources=[write_lines(tmp_path / "v.jsonl", talk)])
    assert texts_of(store, "train")[0] == ("hello</s>good day</s>what is it?", "a pipe")
    assert texts_of(store, "train")[1] == ("what is it?", "a pipe")


def test_fields_of_other_names_and_fields_that_are_not_used(tmp_path: Path, capsys: Any) -> None:
    path = write_lines(tmp_path / "t.jsonl", *({"q": f"{n}?", "a": f"{n}", "id": n} for n in range(1, 30)))
    flags = ["seq2seq", "--source", str(path), "--out", str(tmp_path / "s"), "--train-tokenizer", "--vocab-size"]
    assert launcher.main([*flags, "358", "--fields", "q", "a", "--val-fraction", "0.3"]) == 0
    assert f"29 kept: the field 'id' is not used ({path}: line 1, " in capsys.readouterr().out


def test_a_second_run_does_nothing_and_another_is_an_error(source: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "store"
    first, _ = prepare([source], out, vocab_size=SMALL)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again, is_new = prepare([source], out, vocab_size=SMALL)
    assert not is_new
    assert again.fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    changes: list[tuple[dict[str, Any], str]] = [
        ({"vocab_size": 400}, "another tokenizer"),
        ({"max_token_length": 3}, "another tokenizer"),
        ({"val_fraction": 0.3}, "another validation"),
        ({"fields": ("response", "prompt")}, "another fields"),
        ({"test_sources": [write_lines(tmp_path / "test.jsonl", GOOD)]}, "another test"),
    ]
    for change, what in changes:
        with pytest.raises(ConfigError, match=f"already holds a data set made with {what}: choose another --out"):
            prepare([source], out, **{"vocab_size": SMALL} | change)


def test_what_stands_on_both_sides_is_named_and_counted(tmp_path: Path) -> None:
    others = [{"prompt": f"{number}?", "response": "yes"} for number in range(5)]
    train = write_lines(tmp_path / "train.jsonl", *others, GOOD, others[0])
    val = write_lines(tmp_path / "val.jsonl", {"prompt": "4?", "response": "no"}, GOOD)
    test = write_lines(tmp_path / "test.jsonl", GOOD, others[3])
    store, _ = prepare([train], tmp_path / "s", vocab_size=SMALL, val_sources=[val], test_sources=[test])
    assert store.index["noted"] == {
        "train holds it, and test too": {"count": 2, "first": [f"{train}: line 4", f"{train}: line 6"]},
        "train holds it, and val too": {"count": 1, "first": [f"{train}: line 6"]},
        "val holds it, and test too": {"count": 1, "first": [f"{val}: line 2"]},
    }
    assert [len(store.column(split, "input")) for split in ("train", "val", "test")] == [7, 2, 2], "they are kept"


def test_equal_records_lie_on_one_side_of_a_fraction(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", *RECORDS, *RECORDS)
    store, _ = prepare([path], tmp_path / "s", vocab_size=SMALL, val_fraction=0.3)
    assert not set(texts_of(store, "train")) & set(texts_of(store, "val"))
    assert store.index["noted"] == {}


@pytest.mark.parametrize("longest", [4, None])
def test_the_trained_tokenizer_is_t5_s_in_its_marks(tmp_path: Path, longest: int | None) -> None:
    said = {"prompt": "1234 1234 " * 9, "response": "repeated words and words repeated"}
    path, val = write_lines(tmp_path / "t.jsonl", *[said] * 9), write_lines(tmp_path / "v.jsonl", GOOD)
    store, _ = prepare([path], tmp_path / "s", vocab_size=500, max_token_length=longest, val_sources=[val])
    tokenizer, size = store.tokenizer(), store.vocab_size
    vocabulary = tokenizer.get_vocab()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert [vocabulary[f"<extra_id_{number}>"] for number in range(100)] == list(range(size - 1, size - 101, -1))
    merged = [token for token in vocabulary if len(token) > 1 and not token.startswith("<")]
    assert merged
    assert max(map(len, merged)) <= 4 if longest else max(map(len, merged)) > 4
    assert not [token for token in merged if any(character.isdigit() for character in token)]
    assert len(store.column("train", "input").tokens(0)) == 9 * (4 + 1 + 4 + 1), "each digit by itself"


def test_a_given_tokenizer_is_kept_byte_for_byte_and_its_own_eos_is_not_doubled(source: Path, tmp_path: Path) -> None:
    folder = t5_tokenizer(tmp_path / "t5")
    (folder / "README.md").write_text("no part of it")
    given = load_tokenizer(folder)
    assert given("what is it?")["input_ids"][-1] == given.eos_token_id
    store, _ = prepare([source], tmp_path / "s", tokenizer=folder, val_fraction=0.2)
    kept = {name: data for name, data in content_of(folder).items() if name != "README.md"}
    assert content_of(store.root / "tokenizer") == kept
    assert store.index["overrides"] is None
    data = Seq2SeqData(store="x", max_source_length=64, max_target_length=64)
    samples = PairSamples(store, "train", data, given.eos_token_id)
    prompts = {tuple(given(record["prompt"])["input_ids"]) for record in RECORDS}
    for place in range(len(samples)):
        assert tuple(samples[place].input.tolist()) in prompts
        assert samples[place].target.tolist().count(given.eos_token_id) == 1


def test_what_a_tokenizer_does_not_know_is_counted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", *RECORDS[:4], {"prompt": "what is Ω?", "response": "a pipe"})
    val = write_lines(tmp_path / "v.jsonl", RECORDS[5])
    store, _ = prepare([path], tmp_path / "s", tokenizer=t5_tokenizer(tmp_path / "t5"), val_sources=[val])
    assert store.index["noted"]["holds what the tokenizer does not know"]["first"][-1] == f"{path}: line 5"


@pytest.mark.slow
def test_memory_does_not_grow_with_a_file(tmp_path: Path) -> None:
    import tracemalloc

    def peak(count: int) -> int:
        path, val = tmp_path / f"{count}.jsonl", write_lines(tmp_path / f"v{count}.jsonl", GOOD)
        with path.open("w") as file:
            for number in range(count):
                file.write(json.dumps({"prompt": f"{number} " * 60, "response": "yes"}) + "\n")
        tracemalloc.start()
        prepare([path], tmp_path / f"s{count}", tokenizer=folder, val_sources=[val])
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    folder = t5_tokenizer(tmp_path / "t5")
    peak(10)  # what is imported once
    small, large = peak(1100), peak(3300)
    assert large < 1.2 * small + 3300 * 16


def lines(*found: bytes) -> bytes:
    return b"".join(line + b"\n" for line in (json.dumps(GOOD).encode(), *found))


def record(**fields: Any) -> bytes:
    return lines(json.dumps(GOOD | fields).encode())


HEAD = b"prompt,response,history\n"
BAD: dict[str, tuple[str, bytes, str]] = {
    "no JSON": ("t.jsonl", lines(b"{"), "line 2: not JSON"),
    "no UTF-8": ("t.jsonl", lines(b'{"prompt": "\xff"}'), "line 2: not UTF-8"),
    "no object": ("t.jsonl", lines(b"[1]"), "line 2: not an object"),
    "no prompt": ("t.jsonl", lines(b'{"response": "r"}'), "line 2: has no 'prompt': mend it, or say by --fields"),
    "no response": ("t.jsonl", lines(b'{"prompt": "p"}'), "line 2: has no 'response': mend it, or say by --fields"),
    "a prompt that is a number": ("t.jsonl", record(prompt=5), "line 2: 'prompt' is not text"),
    "an empty prompt": ("t.jsonl", record(prompt=" "), "line 2: 'prompt' is empty"),
    "an empty response": ("t.jsonl", record(response=""), "line 2: 'response' is empty"),
    "a response that is null": ("t.jsonl", record(response=None), "line 2: 'response' is not text"),
    "half a character": ("t.jsonl", record(prompt="\ud800"), "line 2: holds a lone surrogate"),
    "EOS in a prompt": ("t.jsonl", record(prompt="a</s>b"), "line 2: holds </s>, which the model would take for"),
    "PAD in a response": ("t.jsonl", record(response="<pad>"), "line 2: holds <pad>, which the model would take for"),
    "EOS in the history": ("t.jsonl", record(history=[["</s>", "a"]]), "line 2: holds </s>, which the model would"),
    "a history of words": ("t.jsonl", record(history=["a"]), "line 2: 'history' is neither a list of messages nor"),
    "half a pair": ("t.jsonl", record(history=[["a"]]), "line 2: 'history' is neither a list of messages nor"),
    "an empty message": ("t.jsonl", record(history=[{"role": "user"}]), "line 2: a turn of 'history' is not text"),
    "an empty turn": ("t.jsonl", record(history=[["", "a"]]), "line 2: a turn of 'history' is empty"),
    "a record too long": ("t.jsonl", record(prompt="x" * (1 << 20)), "line 2: longer than 1 MiB: split it"),
    "an empty file": ("t.jsonl", b"", "the file is empty"),
    "JSON cut short": ("t.json", b'[{"prompt": "p"', "mend it, or write one object a line as .jsonl"),
    "JSON without a list": ("t.json", b"{}", "holds no list: use [{...}, ...], or one object a line as .jsonl"),
    "JSON of numbers": ("t.json", b"[5]", "item 1: not an object"),
    "Parquet cut short": ("t.parquet", b"PAR1", "not a whole Parquet file"),
    "a row too short": ("t.csv", HEAD + b"a,b\n", "line 2: has more or fewer columns than the first line"),
    "columns of one name": ("t.csv", b"prompt,prompt\n", "line 1: two columns have one name: mend the line"),
    "a quote without an end": ("t.csv", HEAD + b'"a,b,\n', "not a table (unexpected end of data): mend it there"),
    "a table of no UTF-8": ("t.tsv", b"prompt\tresponse\n\xff\ta\n", "not UTF-8 (byte 17): save the file as UTF-8"),
    "history in a table": ("t.csv", HEAD + b"a,b,[\n", "line 2: 'history' is text that is not JSON"),
    "columns of other names": ("t.csv", b"q,a\nx,y\n", "line 2: has no 'prompt': mend it, or say by --fields"),
    "a format that is not read": ("t.xlsx", b"x", "cannot be read: convert it to one of .parquet, .jsonl, .json, .csv"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_named_with_file_line_reason_and_remedy(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(sources, "MAX_RECORD_BYTES", 1 << 20)
    name, data, message = BAD[kind]
    path, good = tmp_path / name, write_lines(tmp_path / "good.jsonl", *RECORDS)
    path.write_bytes(data)
    flags = ["--source", str(good), str(path), "--out", str(tmp_path / "out"), "--max-bad-fraction", "0"]
    assert launcher.main(["seq2seq", *flags, "--train-tokenizer", "--vocab-size", "358"]) == 2
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if str(path) in line]
    assert message in line
    assert "Traceback" not in said
    assert any(remedy in said for remedy in ("mend", "convert it", "write it again", "save the file", "use [{...}"))
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([name, "good.jsonl"]), "nothing is left behind"


def test_good_records_are_used_and_bad_ones_counted(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(
        lines(b"{", *(json.dumps(each).encode() for each in RECORDS), json.dumps(GOOD | {"prompt": ""}).encode())
    )
    flags = [
        "seq2seq",
        "--source",
        str(path),
        "--out",
        str(tmp_path / "out"),
        "--train-tokenizer",
        "--vocab-size",
        "358",
    ]
    assert launcher.main([*flags, "--val-fraction", "0.2"]) == 0
    said = capsys.readouterr().out
    assert f"1 left out: 'prompt' is empty ({path}: line 63)" in said
    assert f"1 left out: not JSON ({path}: line 2)" in said
    store = Store.open(tmp_path / "out")
    assert sum(entry.samples for entry in store.entries.values()) == 61


def test_too_many_bad_records_show_before_anything_is_tokenized(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", *RECORDS, *({"prompt": number} for number in range(40)))
    with pytest.raises(DataError) as raised:
        prepare([path], tmp_path / "made" / "out", vocab_size=SMALL)
    assert str(raised.value).startswith("40 of 100 records cannot be used, more than --max-bad-fraction 0.1 allows")
    assert str(raised.value).count("\n") == 10
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source", "{folder}/nowhere.jsonl"], "nowhere.jsonl: no such file or folder: check the path"),
        (["--source", "{folder}/empty"], "empty: no file to read: an empty folder; put files there that end in"),
        (
            ["--source", "{source}", "--val-source", "{source}"],
            "given as --source and as --val-source: leave it out of one",
        ),
        (
            ["--source", "{source}", "--test-source", "{source}"],
            "given as --source and as --test-source: leave it out of",
        ),
        (["--source", "{source}", "--fields", "a", "a"], "--fields a a: the prompt and the response need a field each"),
        (["--source", "{source}", "--kind", "text", "--fields", "a", "b"], "--fields a b: goes with --kind pairs"),
        (["--source", "{source}", "--val-fraction", "0"], "--val-fraction 0: use a number between 0 and 1"),
        (
            ["--source", "{source}", "--val-fraction", "0.00001"],
            "60 records to train on and none for validation: raise",
        ),
        (["--source", "{source}", "--max-bad-fraction", "2"], "--max-bad-fraction 2: use a number from 0 to 1"),
        (
            ["--source", "{source}", "--vocab-size", "300"],
            "--vocab-size 300: use 358 or more, for PAD, EOS, bytes and 100",
        ),
        (["--source", "{source}", "--max-token-length", "0"], "--max-token-length 0: use 1 or more characters"),
    ],
)
def test_settings_that_cannot_be(source: Path, tmp_path: Path, capsys: Any, flags: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    given = [flag.format(folder=tmp_path, source=source) for flag in flags]
    assert launcher.main(["seq2seq", *given, "--out", str(tmp_path / "out"), "--train-tokenizer"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "changes", "message"),
    [
        (["--vocab-size", "400"], {}, "--vocab-size: goes with --train-tokenizer"),
        (["--max-token-length", "4"], {}, "--max-token-length: goes with --train-tokenizer"),
        ([], {"pad_token": None}, "the tokenizer has no PAD token, with which a decoder starts: set pad_token"),
        ([], {"pad_token": "</s>"}, "PAD and EOS are one token"),
    ],
)
def test_a_tokenizer_that_cannot_be(
    source: Path, tmp_path: Path, capsys: Any, flags: list[str], changes: dict[str, Any], message: str
) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = t5_tokenizer(tmp_path / "t5")
    if changes:
        marks = {"eos_token": "</s>", "unk_token": "<unk>"} | {key: value for key, value in changes.items() if value}
        PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **marks).save_pretrained(folder)
    given = ["--source", str(source), "--out", str(tmp_path / "out"), "--tokenizer", str(folder), *flags]
    assert launcher.main(["seq2seq", *given]) == 2
    assert message in capsys.readouterr().err


def test_a_sentinel_in_a_text_is_refused_and_in_a_pair_is_not(tmp_path: Path) -> None:
    text = write_lines(
        tmp_path / "t.jsonl", *({"text": f"{number} words"} for number in range(40)), {"text": "<extra_id_0> x"}
    )
    store, _ = prepare([text], tmp_path / "t", kind="text", vocab_size=SMALL, val_fraction=0.2)
    assert list(store.index["skipped"]) == [
        "holds <extra_id_0>, which the model would take for the real one: remove it"
    ]
    pair = write_lines(tmp_path / "p.jsonl", *RECORDS[:9], {"prompt": "<extra_id_0> x", "response": "<extra_id_0> y"})
    val = write_lines(tmp_path / "v.jsonl", GOOD)
    asked, _ = prepare([pair], tmp_path / "p", vocab_size=SMALL, val_sources=[val])
    assert len(asked.column("train", "input")) == 10
