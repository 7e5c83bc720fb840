from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from trunkline.engine.errors import ConfigError, DataError
from trunkline.launchers import prepare as launcher
from trunkline.models.causal_lm.prepare import prepare
from trunkline.models.causal_lm.store import Store
from trunkline.models.causal_lm.tokenizer import train_tokenizer
from trunkline.models.text import chat_template
from trunkline.models.text.skipped import Tally, remarks
from trunkline.models.text.sources import Place

ROOT = Path(__file__).parents[3]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def texts_of(store: Store, split: str) -> list[str]:
    tokenizer, sequences = store.tokenizer(), store.split(split)
    return [tokenizer.decode(sequences.tokens(i)) for i in range(len(sequences))]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [{"text": f"document {i} of {'many ' * (i % 7)}words"} for i in range(200)]
    return write_lines(tmp_path_factory.mktemp("source") / "texts.jsonl", *records, *records[:50])


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [{"prompt": f"what is {i}?", "response": f"a number, {i}"} for i in range(60)]
    return write_lines(tmp_path_factory.mktemp("source") / "talks.jsonl", *records)


def test_texts_become_a_store(source: Path, tmp_path: Path) -> None:
    store, is_new = prepare([source], tmp_path / "store", kind="text", vocab_size=400, val_fraction=0.2)
    assert is_new
    written = [json.loads(line)["text"] + "<|endoftext|>" for line in source.read_text().splitlines()]
    train, val = texts_of(store, "train"), texts_of(store, "val")
    assert sorted(train + val) == sorted(written)
    assert train == [text for text in written if text in set(train)], "the order of the file"
    assert not set(train) & set(val), "equal records lie on the same side"
    assert 25 < len(val) < 80
    assert store.index["records"] == {"train": len(train), "val": len(val)}
    store.verify()


def test_a_record_keeps_its_side_when_others_join(source: Path, tmp_path: Path) -> None:
    more = write_lines(tmp_path / "more.jsonl", *({"text": f"another {i}"} for i in range(30)))
    first, _ = prepare([source], tmp_path / "a", kind="text", vocab_size=300)
    second, _ = prepare([more, source], tmp_path / "b", kind="text", vocab_size=300)
    assert set(texts_of(first, "val")) <= set(texts_of(second, "val"))
    assert set(texts_of(first, "train")) <= set(texts_of(second, "train"))


def test_the_tokenizer_learns_from_training_records_only(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", *({"text": "abab"} for _ in range(9)))
    val = write_lines(tmp_path / "val.jsonl", *({"text": "xyxy"} for _ in range(9)))
    store, _ = prepare([train], tmp_path / "store", kind="text", vocab_size=400, val_sources=[val])
    vocabulary = store.tokenizer().get_vocab()
    assert "ab" in vocabulary
    assert "xy" not in vocabulary
    assert texts_of(store, "val") == ["xyxy<|endoftext|>"] * 9


def test_the_number_of_workers_changes_nothing(conversations: Path, tmp_path: Path) -> None:
    prepare([conversations], tmp_path / "one", kind="conversations", vocab_size=300, workers=1)
    prepare([conversations], tmp_path / "two", kind="conversations", vocab_size=300, workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_the_answers_are_what_is_learned(conversations: Path, tmp_path: Path) -> None:
    store, _ = prepare([conversations], tmp_path / "store", kind="conversations", vocab_size=300, val_fraction=0.3)
    tokenizer, sequences = store.tokenizer(), store.split("train")
    for i in range(len(sequences)):
        ids, mask = sequences.tokens(i), sequences.loss_mask(i)
        number = tokenizer.decode(ids).split("?")[0].split()[-1]
        assert tokenizer.decode(ids[mask]) == f"a number, {number}<|im_end|>"


def test_preferences_come_in_pairs(tmp_path: Path) -> None:
    records = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]
    source = write_lines(tmp_path / "p.jsonl", *records)
    store, _ = prepare([source], tmp_path / "store", kind="preferences", vocab_size=300, val_fraction=0.2)
    train = texts_of(store, "train")
    assert len(train) == 2 * store.index["records"]["train"]
    for chosen, rejected in zip(train[0::2], train[1::2]):
        assert "good" in chosen
        assert rejected == chosen.replace("good", "bad")


def test_a_second_run_does_nothing_and_other_inputs_are_an_error(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    first, _ = prepare([source], out, kind="text", vocab_size=300)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    moved = tmp_path / "texts.jsonl"
    moved.write_bytes(source.read_bytes())
    again, is_new = prepare([moved], out, kind="text", vocab_size=300, workers=2)
    assert not is_new
    assert again.fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    write_lines(moved, {"text": "something else"})
    for changed, what in [
        ({"sources": [moved]}, "another source"),
        ({"vocab_size": 301}, "another tokenizer"),
        ({"val_fraction": 0.5}, "another validation"),
    ]:
        settings: dict[str, Any] = {"sources": [source], "kind": "text", "vocab_size": 300, **changed}
        with pytest.raises(
            ConfigError, match=rf"store: already holds a data set made with {what}: choose another --out"
        ):
            prepare(out=out, **settings)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_the_tokenizer_of_another_store_serves_on(source: Path, conversations: Path, tmp_path: Path) -> None:
    first, _ = prepare([source], tmp_path / "a", kind="text", vocab_size=300)
    second, _ = prepare([conversations], tmp_path / "b", kind="conversations", tokenizer=tmp_path / "a/tokenizer")
    assert content(tmp_path / "a/tokenizer") == content(tmp_path / "b/tokenizer")
    assert first.vocab_size == second.vocab_size


def test_a_chat_template_replaces_the_tokenizers_own(conversations: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}")
    out = tmp_path / "store"
    store, _ = prepare([conversations], out, kind="conversations", vocab_size=300, chat_template=template)
    assert texts_of(store, "train")[0] == "user=what is 0?;assistant=a number, 0;<|endoftext|>"
    template.write_text("{% for m in messages %}{{ raise_exception('not today') }}{% endfor %}")
    with pytest.raises(DataError, match=r"talks\.jsonl: line 1: the chat template fails: not today"):
        prepare([conversations], tmp_path / "other", kind="conversations", vocab_size=300, chat_template=template)
    assert not list(tmp_path.glob("*other*")), "neither a store nor a draft"
    template.write_text(" \n")
    with pytest.raises(ConfigError, match="empty: a chat template writes messages"):
        prepare([conversations], tmp_path / "other", kind="conversations", vocab_size=300, chat_template=template)


def test_bad_records_are_left_out_counted_and_shown(source: Path, tmp_path: Path, capsys: Any) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(b'{"text": "\xff"}\n{"text": ""}\n{"txt": 1}\n{"text": " "}\n' + b'{"text": "\\n"}\n' * 3)
    arguments = ["causal_lm", "--kind", "text", "--source", str(source), str(bad), "--train-tokenizer"]
    arguments += ["--vocab-size", "300", "--out", str(tmp_path / "store")]
    assert launcher.main(arguments) == 0
    printed = capsys.readouterr().out
    where = f"{bad}: line"
    assert f"  5 left out: the text is empty ({where} 2, {where} 4, {where} 5, ...)\n" in printed
    assert f"  1 left out: not UTF-8 ({where} 1)\n" in printed
    skipped = Store.open(tmp_path / "store").index["skipped"]
    assert {reason: entry["count"] for reason, entry in skipped.items()} == {
        "the text is empty": 5,
        "has no 'text'": 1,
        "not UTF-8": 1,
    }
    assert launcher.main(arguments) == 0
    assert "already prepared from the same files; nothing to do" in capsys.readouterr().out


def test_too_many_bad_records_are_an_error_that_shows_ten(source: Path, tmp_path: Path) -> None:
    bad = write_lines(tmp_path / "bad.jsonl", *({"txt": i} for i in range(40)))
    with pytest.raises(DataError, match="40 of 290 records cannot be used, more than --max-bad-fraction") as error:
        prepare([source, bad], tmp_path / "store", kind="text", vocab_size=300)
    assert str(error.value).splitlines()[1:] == [f"  {bad}: line {i}: has no 'text'" for i in range(1, 11)]
    prepare([source, bad], tmp_path / "store", kind="text", vocab_size=300, max_bad_fraction=0.2)


def test_no_records_at_all_are_an_error(source: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.jsonl: the file is empty"):
        prepare([empty], tmp_path / "store", kind="text")
    with pytest.raises(DataError, match=r"empty\.jsonl: no records to train on"):
        prepare([empty], tmp_path / "store", kind="text", max_bad_fraction=1)
    empty.write_bytes(b"\n\n")
    with pytest.raises(DataError, match=r"empty\.jsonl: no records to train on: check the files, and that --kind"):
        prepare([empty], tmp_path / "store", kind="text")
    one = write_lines(tmp_path / "one.jsonl", {"text": "alone"})
    with pytest.raises(DataError, match=r"1 records to train on and none for validation: raise --val-fraction"):
        prepare([one], tmp_path / "store", kind="text", val_fraction=0.01)
    assert len(prepare([one], tmp_path / "store", kind="text", val_fraction=0)[0].split("val")) == 0


LONG = "many words " * 100_000


def test_a_long_document_is_kept_whole(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(LONG)
    (tmp_path / "val.txt").write_text("few")
    store, _ = prepare(
        [tmp_path / "long.txt"], tmp_path / "store", kind="text", vocab_size=300, val_sources=[tmp_path / "val.txt"]
    )
    assert texts_of(store, "train") == [LONG + "<|endoftext|>"]
    assert store.entries["train"].longest == len(store.split("train").tokens(0))


def test_a_foreign_tokenizer_without_a_template_joins_prompt_and_response(conversations: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer([], 260)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    store, _ = prepare([conversations], tmp_path / "store", kind="conversations", tokenizer=tmp_path / "tokenizer")
    assert texts_of(store, "train")[0] == "what is 0?a number, 0<|endoftext|>"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_fraction": 1.0}, "--val-fraction 1.0: use a number from 0 to below 1"),
        ({"max_bad_fraction": -1}, "--max-bad-fraction -1: use a number from 0 to 1"),
        ({"workers": 0}, "--workers 0: use 1 or more"),
        ({"vocab_size": 10}, "--vocab-size 10: use 260 or more"),
        ({"tokenizer": Path("nowhere")}, "nowhere: no such folder"),
        ({"chat_template": Path("nowhere.jinja")}, r"nowhere\.jinja: cannot be read"),
    ],
)
def test_settings_that_cannot_be(source: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare([source], tmp_path / "store", kind="text", **settings)
    assert list(tmp_path.iterdir()) == []


def test_an_out_that_is_something_else_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/one.jpg").write_bytes(b"jpg")
    with pytest.raises(DataError, match=r"photos: not empty and not a prepared data set: choose another --out"):
        prepare([source], tmp_path / "photos", kind="text")
    with pytest.raises(DataError, match="not a folder"):
        prepare([source], tmp_path / "photos/one.jpg", kind="text")
    with pytest.raises(DataError, match="contain one another"):
        prepare([source], source.parent, kind="text")
    assert content(tmp_path) == {"photos/one.jpg": b"jpg"}


def test_a_file_cannot_train_and_validate(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"texts\.jsonl: given both to train on and as --val-source"):
        prepare([source.parent], tmp_path / "store", kind="text", val_sources=[source])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--example", "--tokenizer", "x", "--vocab-size", "300"], "--vocab-size: goes with --train-tokenizer"),
        (["--example", "--train-tokenizer", "--val-fraction", "0.1"], "--example has validation records of its own"),
    ],
)
def test_flags_that_exclude_each_other(tmp_path: Path, capsys: Any, flags: list[str], message: str) -> None:
    assert launcher.main(["causal_lm", "--kind", "text", "--out", str(tmp_path / "store"), *flags]) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_the_example_becomes_a_store_of_each_kind(tmp_path: Path, capsys: Any) -> None:
    common = ["--example", "--out", str(tmp_path / "store"), "--train-tokenizer", "--vocab-size", "400"]
    assert launcher.main(["causal_lm", "--kind", "preferences", *common]) == 0
    assert "nobody judged these pairs" in capsys.readouterr().out
    store = Store.open(tmp_path / "store")
    assert store.kind == "preferences"
    assert len(store.split("val")) == 2 * len((tmp_path / "example/preferences-val.jsonl").read_text().splitlines())


@pytest.mark.fault("kill -9 while records of language models are tokenized")
def test_killed_in_the_middle_it_leaves_no_store_and_the_next_run_makes_it_whole(tmp_path: Path) -> None:
    records = ({"text": f"document {i} of {'many ' * 200}words"} for i in range(3_000))
    source, out = write_lines(tmp_path / "texts.jsonl", *records), tmp_path / "store"
    train_tokenizer([], 260).save_pretrained(tmp_path / "tokenizer")
    command = [
        sys.executable,
        str(ROOT / "launchers/prepare.py"),
        "causal_lm",
        "--source",
        str(source),
        "--kind",
        "text",
    ]
    command += ["--tokenizer", str(tmp_path / "tokenizer"), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    tokens = tmp_path / ".store.draft/train/tokens.npy"
    while not (tokens.is_file() and tokens.stat().st_size > 1 << 16):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists(), "the kill did not come in the middle"
    small = write_lines(tmp_path / "texts.jsonl", *({"text": f"document {i}"} for i in range(100)))
    prepare([small], out, kind="text", tokenizer=tmp_path / "tokenizer")
    prepare([small], tmp_path / "unbroken", kind="text", tokenizer=tmp_path / "tokenizer")
    assert content(out) == content(tmp_path / "unbroken")
    assert not tokens.exists()


def test_what_is_not_used_is_counted_and_named_and_kept_in_the_store(tmp_path: Path, capsys: Any) -> None:
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    records: list[Any] = [{"messages": [user, answer], "score": i} for i in range(1, 5)]
    records.append({"messages": [user, {**answer, "reasoning_content": "because"}], "system": "be kind"})
    records.append({"messages": [user, {**answer, "weight": 0}, user, {**answer, "content": "b"}]})
    records.append({"messages": [user, {**answer, "weight": 2}]})
    source, out = write_lines(tmp_path / "talks.jsonl", *records), tmp_path / "store"
    train_tokenizer([], 260).save_pretrained(tmp_path / "tokenizer")
    flags = ["causal_lm", "--kind", "conversations", "--source", str(source), "--out", str(out)]
    flags += ["--tokenizer", str(tmp_path / "tokenizer"), "--val-fraction", "0", "--max-bad-fraction", "0.5"]
    said = [
        f"1 left out: 'weight' of a message is neither 0 nor 1: a turn is learned or it is not ({source}: line 7)",
        f"4 kept: the field 'score' is not used ({source}: line 1, {source}: line 2, {source}: line 3, ...)",
        "1 kept: 'reasoning_content' of a message of role 'assistant' is left out or changed by the chat template "
        f"({source}: line 5)",
    ]
    for _ in range(2):  # the second time it is the finished store that says it
        assert launcher.main(flags) == 0
        assert capsys.readouterr().out.splitlines()[-3:] == [f"  {line}" for line in said]
    store = Store.open(out)
    assert remarks(store.index) == said
    assert store.index["noted"]["the field 'score' is not used"]["count"] == 4
    assert texts_of(store, "train")[4].startswith("<|im_start|>system\nbe kind<|im_end|>")
    sequences, tokenizer = store.split("train"), store.tokenizer()
    assert tokenizer.decode(sequences.tokens(5)[sequences.loss_mask(5)]) == "b<|im_end|>"


def test_a_store_of_a_version_that_noted_nothing_opens_and_says_so(
    conversations: Path, tmp_path: Path, capsys: Any
) -> None:
    flags = ["causal_lm", "--kind", "conversations", "--source", str(conversations), "--train-tokenizer"]
    flags += ["--vocab-size", "300", "--out", str(tmp_path / "store")]
    assert launcher.main(flags) == 0
    index = json.loads((tmp_path / "store/store.json").read_text())
    del index["noted"]
    (tmp_path / "store/store.json").write_text(json.dumps(index))
    assert launcher.main(flags) == 0
    assert "by a version that did not read 'weight'" in capsys.readouterr().out
    assert remarks(Store.open(tmp_path / "store").index) == []


def test_a_template_that_never_ends_stops_the_preparation_with_its_name_and_the_records(
    conversations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 0.2)
    template = tmp_path / "endless.jinja"
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template.write_text("{% if messages[0].content != 'a' %}" + loops + "{% endif %}{{ messages[0].content }}")
    with pytest.raises(DataError, match="of 60 records cannot be used") as error:
        prepare([conversations], tmp_path / "store", kind="conversations", vocab_size=300, chat_template=template)
    assert (
        f"{conversations}: line 1: the chat template {template} takes more than 0.2 s for one record: mend the "
        "template, or split the record"
    ) in str(error.value)
    assert not (tmp_path / "store").exists()


def test_reasons_of_any_number_and_length_stay_few_and_short() -> None:
    tally = Tally()
    for number in range(1000):
        tally.add(Place(Path("a.jsonl"), number), f"{number} " + "x" * 1000)
    counted = tally.to_json()
    assert len(counted) == 201
    assert counted["other reasons"]["count"] == 800
    assert max(map(len, counted)) == 400
