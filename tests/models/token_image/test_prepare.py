from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from trunkline.engine.errors import ConfigError
from trunkline.launchers import prepare as launcher
from trunkline.models.text import chat_template, sources
from trunkline.models.text.bpe import EOS, train_tokenizer
from trunkline.models.text.tokenizer import load_tokenizer
from trunkline.models.token_image.prepare import prepare
from trunkline.models.token_image.records import KINDS
from trunkline.models.token_image.store import Store

TALK = [{"prompt": f"what is {number}?", "answer": f"a number, {number}"} for number in range(40)]
LLAMA_LIKE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST] "
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def texts_of(store: Store, split: str = "train", column: str = "text") -> list[str]:
    tokenizer, held = store.tokenizer(), store.column(split, column)
    return [tokenizer.decode(held.tokens(place)) for place in range(len(held))]


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources and tokenizers, good and bad, which no preparation may change."""
    folder = tmp_path_factory.mktemp("inputs")
    write_lines(folder / "good.jsonl", *TALK)
    write_lines(folder / "val.jsonl", {"text": "held out"})
    (folder / "empty").mkdir()
    tokenizer = train_tokenizer((record["answer"] for record in TALK), 300)
    tokenizer.add_tokens(["<|turn|>"], special_tokens=True)
    tokenizer.save_pretrained(folder / "plain")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder / "without_eos")
    shutil.copytree(folder / "plain", folder / "damaged")
    (folder / "damaged" / "tokenizer.json").write_text('{"version": "1.0", "model"')
    for name, template in {
        "chat": LLAMA_LIKE, "raising": "{{ raise_exception('no talk of ' + messages[0].content) }}",
        "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    }.items():  # fmt: skip
        shutil.copytree(folder / "plain", folder / name)
        (folder / name / "chat_template.jinja").write_text(template)
    shutil.copytree(folder / "plain", folder / "several")
    (folder / "several" / "additional_chat_templates").mkdir()
    (folder / "several" / "additional_chat_templates" / "tools.jinja").write_text(LLAMA_LIKE)
    return folder


def test_every_format_becomes_the_same_store(tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    records = [*TALK, *({"prompt": record["answer"], "answer": record["prompt"]} for record in TALK)]
    frame = pl.DataFrame(records)
    (given / "a.json").write_text(json.dumps(records))
    write_lines(given / "b.jsonl", *records)
    frame.write_parquet(given / "c.parquet")
    frame.write_csv(given / "d.csv")
    frame.write_csv(given / "e.tsv", separator="\t")
    stores = [prepare([path], tmp_path / path.suffix, tokenizer="bytes")[0] for path in sorted(given.iterdir())]
    assert all(store.arrays == stores[0].arrays for store in stores)
    stores[0].verify()
    both = texts_of(stores[0]) + texts_of(stores[0], "val")
    assert sorted(both) == sorted(f"{record['prompt']}\n{record['answer']}" for record in records)
    whole, _ = prepare([given], tmp_path / "whole", tokenizer="bytes")
    assert whole.entries["train"].text_tokens == 5 * stores[0].entries["train"].text_tokens


def test_records_of_every_form_become_one_text_each(tmp_path: Path) -> None:
    records: list[Any] = ["just a string", {"text": " kept as it is\n"}, {"prompt": "p", "answer": "a"}]
    records.append({"prompt": "p", "response": "r"})
    (tmp_path / "t.json").write_text(json.dumps(records))
    (tmp_path / "u.txt").write_bytes("﻿first\r\n\r\n  \n two \nno line break at the end é".encode())
    val = write_lines(tmp_path / "v.jsonl", "held out")
    store, _ = prepare([tmp_path / "t.json", tmp_path / "u.txt"], tmp_path / "s", tokenizer="bytes", val_sources=[val])
    assert texts_of(store) == [
        "just a string", " kept as it is\n", "p\na", "p\nr", "first", " two ", "no line break at the end é"
    ]  # fmt: skip
    assert store.index["skipped"] == store.index["noted"] == {}


def test_a_dialogue_s_prompt_is_its_condition_and_a_text_alone_has_none(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", *TALK[:2], {"text": "alone", "id": 7})
    val = write_lines(tmp_path / "v.jsonl", TALK[3])
    store, _ = prepare([path], tmp_path / "s", kind="dialogues", tokenizer="bytes", val_sources=[val])
    assert texts_of(store) == [TALK[0]["answer"], TALK[1]["answer"], "alone"]
    assert texts_of(store, column="condition") == [TALK[0]["prompt"], TALK[1]["prompt"], ""]
    assert store.index["noted"] == {
        "has no prompt, so that its condition is empty": {"count": 1, "first": [f"{path}: line 3"]},
        "the field 'id' is not used": {"count": 1, "first": [f"{path}: line 3"]},
    }


def test_bytes_are_their_own_tokens_in_every_script(tmp_path: Path) -> None:
    texts = ["naïve 漢字 🙂 \x01\x7f\t", "Ω", "a" * 9_000]
    path, val = write_lines(tmp_path / "t.jsonl", *texts), write_lines(tmp_path / "v.jsonl", "é")
    store, _ = prepare([path], tmp_path / "s", tokenizer="bytes", val_sources=[val])
    held = store.column("train", "text")
    assert [bytes(held.tokens(place).tolist()) for place in range(3)] == [text.encode() for text in texts]
    assert store.vocab_size == 256
    assert texts_of(store) == texts


def test_any_tokenizer_gives_its_own_tokens_once_and_adds_none(folder: Path, tmp_path: Path) -> None:
    """Also above 4,096 characters, where images and masks of two tokenizations once differed."""
    long = "a number, " * 900
    path = write_lines(tmp_path / "t.jsonl", *TALK, long)
    store, _ = prepare([path], tmp_path / "s", tokenizer=folder / "plain", val_sources=[folder / "val.jsonl"])
    given = load_tokenizer(folder / "plain")
    expected = [f"{record['prompt']}\n{record['answer']}" for record in TALK] + [long]
    held = store.column("train", "text")
    assert [held.tokens(place).tolist() for place in range(41)] == [
        given.encode(text, add_special_tokens=False) for text in expected
    ]
    assert store.vocab_size == len(given)
    assert content_of(store.root / "tokenizer") == content_of(folder / "plain"), "byte for byte"


def test_a_text_or_a_condition_that_becomes_a_mark_is_refused(folder: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", *TALK, {"prompt": "a<|turn|>", "answer": "b"}, f"a{EOS}")
    for kind in KINDS:
        store, _ = prepare(
            [path], tmp_path / kind, kind=kind, tokenizer=folder / "plain", val_sources=[folder / "val.jsonl"]
        )
        assert store.index["skipped"] == {
            f"holds {mark}, which the model would take for the real one: remove it": {
                "count": 1, "first": [f"{path}: line {line}"]
            }
            for mark, line in ((EOS, 42), ("<|turn|>", 41))
        }  # fmt: skip


def test_a_tokenizer_is_trained_on_the_training_records_alone(tmp_path: Path, capsys: Any) -> None:
    path = write_lines(tmp_path / "t.jsonl", *["pressure falls"] * 30)
    val = write_lines(tmp_path / "v.jsonl", *["compressor station"] * 30)
    flags = ["--source", str(path), "--val-source", str(val), "--train-tokenizer", "--vocab-size", "400"]
    assert launcher.main(["token_image", *flags, "--out", str(tmp_path / "s")]) == 0
    store = Store.open(tmp_path / "s")
    words = set(store.tokenizer().get_vocab())
    assert {"pressure", "Ġfalls"} <= words
    assert not words & {"station", "Ġstation", "comp"}
    assert store.tokenizer().eos_token == EOS
    assert store.tokenizer().eos_token_id == 0
    assert [store.column("train", "text").lengths.tolist()] == [[2] * 30]
    said = capsys.readouterr().out
    assert f"--vocab-size 400: the records give no more than {store.vocab_size}" in said
    assert "train: 30 records, 60 tokens" in said


def test_the_chat_template_writes_prompt_and_answer_and_no_second_eos(folder: Path, tmp_path: Path) -> None:
    taken = {"prompt": f"say {EOS}", "answer": "no"}
    path = write_lines(tmp_path / "t.jsonl", *TALK, {"text": "as it is"}, taken)
    store, _ = prepare(
        [path], tmp_path / "s", tokenizer=folder / "chat", val_sources=[folder / "val.jsonl"], use_chat_template=True
    )
    given = load_tokenizer(folder / "chat")
    expected = [
        given.apply_chat_template(
            [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["answer"]}],
            tokenize=False,
        )
        for record in TALK
    ]
    assert all(text.endswith(EOS) for text in expected)
    assert texts_of(store) == [*(text.removesuffix(EOS) for text in expected), "as it is"]
    assert given.eos_token_id not in {*store.column("train", "text").stretch(0, store.entries["train"].text_tokens)}
    assert list(store.index["skipped"]) == [f"holds {EOS}, which the model would take for the real one: remove it"]


def test_eos_that_a_template_writes_within_a_text_is_told_of(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "plain", tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content + eos_token }}\n{% endfor %}"
    )
    path = write_lines(tmp_path / "t.jsonl", *TALK)
    store, _ = prepare(
        [path], tmp_path / "s", tokenizer=tmp_path / "t", val_sources=[folder / "val.jsonl"], use_chat_template=True
    )
    assert store.index["noted"] == {
        "the chat template writes EOS within the text, and a sampled text ends at its first EOS": {
            "count": 40, "first": [f"{path}: line {line}" for line in (1, 2, 3)]
        }
    }  # fmt: skip


def test_a_second_run_does_nothing_and_another_is_an_error(folder: Path, tmp_path: Path, capsys: Any) -> None:
    good, out = folder / "good.jsonl", tmp_path / "s"
    prepare([good], out, tokenizer="bytes", val_fraction=0.2)
    before = content_of(out)
    given = ["--source", str(good), "--byte-tokenizer", "--val-fraction", "0.2", "--out", str(out)]
    assert launcher.main(["token_image", *given]) == 0
    assert "already prepared from the same files; nothing to do" in capsys.readouterr().out
    assert content_of(out) == before
    changes: list[tuple[dict[str, Any], str]] = [
        ({"kind": "dialogues"}, "another kind"),
        ({"tokenizer": None}, "another tokenizer"),
        ({"tokenizer": folder / "plain"}, "another tokenizer"),
        ({"tokenizer": folder / "chat", "use_chat_template": True}, "another chat template and another tokenizer"),
        ({"val_fraction": 0.3}, "another validation"),
        ({"test_sources": [folder / "val.jsonl"]}, "another test"),
    ]
    for change, what in changes:
        with pytest.raises(ConfigError, match=f"already holds a data set made with {what}: choose another --out"):
            prepare([good], out, **{"tokenizer": "bytes", "val_fraction": 0.2} | change)


def test_an_example_becomes_the_demo_s_store(tmp_path: Path, capsys: Any) -> None:
    topics, out = tmp_path / "topics", tmp_path / "store"
    assert launcher.main(["token_image", "--example", "topics", "--out", str(topics)]) == 0
    sources_of = [
        word for part, flag in (("train", "--source"), ("val", "--val-source"), ("test", "--test-source"))
        for word in (flag, str(topics / f"{part}.jsonl"))
    ]  # fmt: skip
    assert launcher.main(["token_image", *sources_of, "--byte-tokenizer", "--out", str(out)]) == 0
    store = Store.open(out)
    for split in ("train", "val", "test"):
        lines = (topics / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert texts_of(store, split) == [json.loads(line)["text"] for line in lines]
    assert store.index["skipped"] == store.index["noted"] == {}
    assert "records, " in capsys.readouterr().out


def lines(*found: bytes) -> bytes:
    return b"".join(line + b"\n" for line in (b'{"text": "fine"}', *found))


BYTES = ["--byte-tokenizer"]
GOOD = ["--source", "{folder}/good.jsonl", "--val-source", "{folder}/val.jsonl"]
CHAT = [*GOOD, "--use-chat-template", "--tokenizer"]

BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "a line of no UTF-8": ("t.jsonl", lines(b'{"text": "\xff"}'), "t.jsonl: line 2: not UTF-8"),
    "a line of no JSON": ("t.jsonl", lines(b"{"), "t.jsonl: line 2: not JSON"),
    "JSON nested deep": ("t.jsonl", lines(b"[" * 100_000), "t.jsonl: line 2: not JSON"),
    "a list": ("t.jsonl", lines(b"[1]"), "t.jsonl: line 2: not an object"),
    "a number for a text": ("t.jsonl", lines(b'{"text": 5}'), "t.jsonl: line 2: 'text' is not text"),
    "null for an answer": ("t.jsonl", lines(b'{"prompt": "p", "answer": null}'), "line 2: 'answer' is not text"),
    "an empty text": ("t.jsonl", lines(b'{"text": " "}'), "t.jsonl: line 2: 'text' is empty"),
    "an empty prompt": ("t.jsonl", lines(b'{"prompt": "", "answer": "a"}'), "line 2: 'prompt' is empty"),
    "no field of a known name": ("t.jsonl", lines(b'{"content": "a"}'), "line 2: has neither 'text' nor both"),
    "a prompt alone": ("t.jsonl", lines(b'{"prompt": "p"}'), "line 2: has neither 'text' nor both 'prompt' and"),
    "half a character": ("t.jsonl", lines(b'{"text": "\\ud800"}'), "line 2: holds a lone surrogate"),
    "NUL among bytes": ("t.jsonl", lines(b'{"text": "a\\u0000b"}'), "line 2: holds a NUL character, which"),
    "EOS spelled out": ("t.jsonl", lines(b'{"text": "a<eos>b"}'), "line 2: holds <eos>, which the model would take"),
    "a text of 1 MiB": ("t.jsonl", lines(b'"' + b"x" * (1 << 20) + b'"'), "line 2: longer than 1 MiB: split it"),
    "an empty file": ("t.jsonl", b"", "t.jsonl: the file is empty"),
    "an empty file of text": ("t.txt", b"", "t.txt: the file is empty"),
    "a line of text of no UTF-8": ("t.txt", b"fine\n\xe9\n", "t.txt: line 2: not UTF-8"),
    "JSON cut short": ("t.json", b'["a", "b', "t.json: not JSON (Unterminated string"),
    "JSON of no UTF-8": ("t.json", b'["\xff"]', "t.json: not UTF-8 (byte 3): save the file as UTF-8"),
    "JSON without a list": ("t.json", b'{"text": "a"}', "t.json: holds no list: use [{...}, ...], or one object"),
    "Parquet cut short": ("t.parquet", b"PAR1\x15\x04", "t.parquet: not a whole Parquet file"),
    "a row too short": ("t.csv", b"prompt,answer\na\n", "t.csv: line 2: has more or fewer columns than the first line"),
    "a format that is not read": ("t.docx", b"x", "t.docx: cannot be read: convert it to one of .json, .jsonl"),
}  # fmt: skip
BAD_SETTINGS: dict[str, tuple[list[str], str]] = {
    "no such path": (
        ["--source", "{folder}/nowhere.txt", *BYTES],
        "nowhere.txt: no such file or folder: check the path",
    ),
    "an empty folder": (
        ["--source", "{folder}/empty", *BYTES],
        "empty: no file to read: an empty folder; put files there",
    ),
    "one file for two splits": (
        ["--source", "{folder}/good.jsonl", "--val-source", "{folder}/good.jsonl", *BYTES],
        "good.jsonl: given as --source and as --val-source: leave it out of one",
    ),
    "nothing for validation": (
        ["--source", "{folder}/good.jsonl", "--val-fraction", "1e-9", *BYTES],
        "40 records to train on and none for validation: raise --val-fraction, or give --val-source",
    ),
    "a fraction that is none": (
        [*GOOD[:2], "--val-fraction", "1", *BYTES],
        "--val-fraction 1: use a number between 0 and 1",
    ),
    "a share of bad that is none": (
        [*GOOD, "--max-bad-fraction", "2", *BYTES],
        "--max-bad-fraction 2: use a number from 0",
    ),
    "no tokenizer": (GOOD, "--source: needs --tokenizer FOLDER, --train-tokenizer or --byte-tokenizer"),
    "a size for bytes": ([*GOOD, "--vocab-size", "9", *BYTES], "--vocab-size: goes with --train-tokenizer"),
    "a vocabulary too small": (
        [*GOOD, "--train-tokenizer", "--vocab-size", "256"],
        "--vocab-size 256: use 257 or more, for EOS and every byte alone",
    ),
    "no such tokenizer": (
        [*GOOD, "--tokenizer", "{folder}/nowhere"],
        "nowhere: no such folder: give a folder that holds",
    ),
    "a folder of no tokenizer": (
        [*GOOD, "--tokenizer", "{folder}/empty"],
        "empty: holds no tokenizer (no tokenizer.json)",
    ),
    "a tokenizer without EOS": (
        [*GOOD, "--tokenizer", "{folder}/without_eos"],
        "without_eos: the tokenizer has no EOS token: set eos_token in its tokenizer_config.json",
    ),
    "a damaged tokenizer": (
        [*GOOD, "--tokenizer", "{folder}/damaged"],
        "damaged: not a tokenizer that can be loaded",
    ),
    "no chat template": (
        [*CHAT, "{folder}/plain"],
        "plain: the tokenizer has no chat template, or several and no default: add a chat_template.jinja, or leave out",
    ),
    "several chat templates": (
        [*CHAT, "{folder}/several"],
        "several: the tokenizer has no chat template, or several and no default: add a chat_template.jinja",
    ),
    "a chat template that raises": (
        [*CHAT, "{folder}/raising"],
        "good.jsonl: line 1: the chat template fails: no talk of what is 0?",
    ),
    "a chat template without an end": (
        [*CHAT, "{folder}/endless"],
        "endless: the chat template takes more than 0.2 s: mend it, or leave out --use-chat-template",
    ),
    "a chat template of bytes": (
        [*GOOD, *BYTES, "--use-chat-template"],
        "--use-chat-template: goes with --tokenizer FOLDER",
    ),
    "a chat template of dialogues": (
        [*CHAT, "{folder}/chat", "--kind", "dialogues"],
        "--use-chat-template: goes with --kind texts",
    ),
    "an example with a source's flag": (["--example", "topics", *BYTES], "--byte-tokenizer: goes with --source"),
}


def refusal(capsys: Any, flags: list[str], out: Path) -> str:
    """What a preparation that must fail says of it, having written nothing."""
    before = content_of(out.parent)
    assert launcher.main(["token_image", *flags, "--out", str(out)]) == 2
    said: str = capsys.readouterr().err
    assert "Traceback" not in said
    assert content_of(out.parent) == before
    assert not list(out.parent.glob(".*")), "no draft is left behind"
    return said


def test_bad_files_are_named_with_place_reason_and_remedy(
    folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "MAX_RECORD_BYTES", 1 << 20)
    for kind, (name, data, message) in BAD_FILES.items():
        (tmp_path / name).write_bytes(data)
        flags = [
            "--source",
            str(folder / "good.jsonl"),
            str(tmp_path / name),
            *GOOD[2:],
            "--max-bad-fraction",
            "0",
            *BYTES,
        ]
        said = refusal(capsys, [flag.format(folder=folder) for flag in flags], tmp_path / "out")
        assert message in said, kind
        assert str(tmp_path / name) in said, kind
        assert any(remedy in said for remedy in ("mend", "convert", "write it again", "save the file", "use [")), kind


def test_settings_that_cannot_be_are_named_with_a_remedy(
    folder: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 0.2)
    for kind, (flags, message) in BAD_SETTINGS.items():
        said = refusal(capsys, [flag.format(folder=folder) for flag in flags], tmp_path / "out")
        assert message in said, kind


def test_an_out_that_is_no_place_for_a_store_is_left_as_it_is(folder: Path, tmp_path: Path, capsys: Any) -> None:
    work = tmp_path / "work"
    for name in ("source", "held"):
        (work / name).mkdir(parents=True)
    shutil.copy(folder / "good.jsonl", work / "source" / "t.jsonl")
    (work / "held" / "letter.txt").write_text("keep me")
    for out, message in (
        (work / "held", "held: not empty and not a prepared data set: choose another --out, or empty it"),
        (work / "held" / "letter.txt", "letter.txt: not a folder: choose another --out"),
        (work / "source" / "store", "contain one another: choose an --out of its own"),
        (work, "contain one another: choose an --out of its own"),
    ):
        flags = ["--source", str(work / "source"), "--val-fraction", "0.2", *BYTES]
        assert message in refusal(capsys, flags, out)


def test_good_records_are_used_and_bad_ones_counted_until_they_are_too_many(tmp_path: Path, capsys: Any) -> None:
    path = write_lines(tmp_path / "t.jsonl", *TALK, *[{"text": ""}] * 4, {"text": "\0"})
    flags = ["token_image", "--source", str(path), "--val-fraction", "0.2", *BYTES, "--max-bad-fraction"]
    assert launcher.main([*flags, "0.1", "--out", str(tmp_path / "few")]) == 2
    said = capsys.readouterr().err
    assert "5 of 45 records cannot be used, more than --max-bad-fraction 0.1 allows; mend them" in said
    assert launcher.main([*flags, "0.12", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert f"4 left out: 'text' is empty ({path}: line 41, {path}: line 42, {path}: line 43, ...)" in said
    assert (
        f"1 left out: holds a NUL character, which the tokenizer has no token for: remove it ({path}: line 45)" in said
    )
    assert sum(entry.samples for entry in Store.open(tmp_path / "out").entries.values()) == 40
    assert not (tmp_path / "few").exists()
