"""Answers of a trained run against transformers' own generate; files, talks, and what is said to mistakes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from tests.models.seq2seq.by_transformers import ByTransformers
from trunkline.launchers.predict import main
from trunkline.models.seq2seq.generation import generate
from trunkline.models.seq2seq.trained import Trained, load_trained

PROMPTS = ["one", "two three four five six seven eight nine", "ten", "nine nine", "eleven one twelve four", "six two"]
BEAMS = {"num_beams": 5, "no_repeat_ngram_size": 4}


@pytest.fixture(scope="module")
def trained(trained_run: Path) -> Trained:
    return load_trained(trained_run, torch.device("cpu"))


@pytest.fixture(scope="module")
def alone(trained_run: Path) -> ByTransformers:
    return ByTransformers(trained_run / "best")


def predict(run: Path, *flags: str) -> int:
    return main(["--run", str(run), "--max-new-tokens", "24", *flags])


@pytest.mark.parametrize("options", [{}, BEAMS])
def test_answers_of_batches_are_those_of_transformers_one_by_one(
    trained: Trained, alone: ByTransformers, options: dict[str, Any]
) -> None:
    expected = [alone.answer(prompt, max_new_tokens=24, **options) for prompt in PROMPTS]
    assert len({*expected}) > 3
    for batch_size in (1, 4, 16):
        assert generate(trained, PROMPTS, batch_size, max_new_tokens=24, **options) == expected


def test_one_answer_is_printed_greedy_searched_or_sampled_as_asked(
    trained_run: Path, alone: ByTransformers, capsys: pytest.CaptureFixture[str]
) -> None:
    sampling = {"do_sample": True, "temperature": 0.98, "top_k": 50, "top_p": 0.8}
    for flags, options in (
        ([], {}),
        (["--num-beams", "5", "--no-repeat-ngram-size", "4"], BEAMS),
        (["--sample"], sampling),
        (["--sample", "--temperature", "2", "--top-k", "9", "--top-p", "1", "--seed", "3"],
         {"do_sample": True, "temperature": 2.0, "top_k": 9, "top_p": 1.0}),
    ):  # fmt: skip
        torch.manual_seed(3 if "--seed" in flags else 0)
        expected = alone.answer(PROMPTS[1], max_new_tokens=24, **options)
        assert predict(trained_run, "--prompt", PROMPTS[1], *flags) == 0
        assert capsys.readouterr().out == f"{expected}\n"


def test_an_answer_has_320_tokens_at_most() -> None:
    from trunkline.engine.config.flags import Parser
    from trunkline.models.seq2seq.flags import predict as add_flags

    parser = Parser()
    add_flags(parser)
    assert parser.parse_args(["--chat"]).max_new_tokens == 320


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "csv", "parquet", "stdin"])
def test_prompts_of_every_file_are_answered_in_order(
    trained_run: Path, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path, rows = tmp_path / f"prompts.{kind}", [{"prompt": prompt} for prompt in PROMPTS]
    if kind in ("txt", "stdin"):
        data = "\ufeff" + "\r\n\n".join(PROMPTS) + "\n"
        path.write_bytes(data.encode())
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data.encode())))
    elif kind == "parquet":
        pl.DataFrame(rows).write_parquet(path)
    elif kind == "csv":
        path.write_text("prompt\n" + "\n".join(PROMPTS) + "\n")
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    named, out = "-" if kind == "stdin" else str(path), tmp_path / "deep" / "out.jsonl"
    assert predict(trained_run, "--prompts", named, "--batch-size", "4", "--out", str(out)) == 0
    said = f"note: --prompts {named}: blank lines get no answer: {len(PROMPTS) - 1}, the first is line 2\n"
    assert (said in capsys.readouterr().err) is (kind in ("txt", "stdin"))
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in found] == PROMPTS
    assert [row["answer"] for row in found] == generate(trained, PROMPTS, max_new_tokens=24)


def test_a_talk_in_a_file_is_read_whole_and_answers_without_out_are_printed(
    trained_run: Path, alone: ByTransformers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "talks.jsonl").write_text(json.dumps({"prompt": "three", "history": [["one", "2 2"]]}))
    assert predict(trained_run, "--prompts", str(tmp_path / "talks.jsonl")) == 0
    answer = alone.answer("one", "2 2", "three", max_new_tokens=24)
    assert json.loads(capsys.readouterr().out) == {"history": ["one", "2 2"], "prompt": "three", "answer": answer}


def test_a_chat_reads_the_whole_talk_and_forgets_its_oldest_turns_first(
    trained_run: Path, alone: ByTransformers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*PROMPTS, "", "never read"])))
    assert predict(trained_run, "--chat") == 0
    lines = capsys.readouterr().out.splitlines()
    turns: list[str] = []
    forgotten = 0
    assert lines.pop(0) == "An empty line ends the talk."
    for prompt in PROMPTS:
        turns.append(prompt)
        held = len(turns)
        while sum(len(alone.tokenizer(turn, add_special_tokens=False)["input_ids"]) + 1 for turn in turns) > 64:
            del turns[0]
        if left := held - len(turns):
            forgotten += left
            said = f"> (forgotten: the oldest {left} of {held} turns: the model reads 64 tokens)"
            assert lines.pop(0) == said
            lines[0] = f"> {lines[0]}"
        turns.append(alone.answer(*turns, max_new_tokens=24))
        assert lines.pop(0) == f"> {turns[-1]}"
    assert lines == ["> "]
    assert forgotten > 0
    assert alone.answer(PROMPTS[1], max_new_tokens=24) != alone.answer(*turns[:2], PROMPTS[1], max_new_tokens=24)


def test_a_prompt_that_is_too_long_is_cut_and_that_is_said(
    trained_run: Path, trained: Trained, alone: ByTransformers, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "one two " * 60
    ids = alone.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > 64
    assert predict(trained_run, "--prompt", text) == 0
    shown = capsys.readouterr()
    assert shown.out == alone.answer(alone.tokenizer.decode(ids[:63]), max_new_tokens=24) + "\n"
    assert "1 of 1 prompts are longer than the 64 tokens that the model reads" in shown.err


@pytest.mark.slow
def test_a_kill_keeps_what_is_answered(trained_run: Path, tmp_path: Path) -> None:
    (tmp_path / "many.txt").write_text("one two three\n" * 5000)
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "launchers/predict.py", "--run", str(trained_run), "--prompts",
               str(tmp_path / "many.txt"), "--out", str(out), "--batch-size", "2"]  # fmt: skip
    with subprocess.Popen(command, cwd=Path(__file__).parents[3], env=dict(os.environ), stderr=subprocess.DEVNULL) as p:
        while p.poll() is None and not (out.exists() and out.read_bytes().count(b"\n") > 2):
            time.sleep(0.05)
        p.send_signal(signal.SIGKILL)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert 2 < len(rows) < 5000
    assert {row["prompt"] for row in rows} == {"one two three"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "a", "--system", "x"], "--system: unknown flag"),
        (["--prompt", " "], "--prompt is empty: give a text to answer"),
        (["--prompt", "a\udce9"], "--prompt: not UTF-8 text: set a UTF-8 locale, or use --prompts FILE"),
        (["--prompt", "a", "--top-k", "5"], "--top-k: has no effect without --sample"),
        (["--prompt", "a", "--seed", "5"], "--seed: has no effect without --sample"),
        (["--prompt", "a", "--batch-size", "5"], "--batch-size: has no effect without --prompts"),
        (["--prompt", "a", "--sample", "--temperature", "0"], "--temperature 0.0: use a value above 0"),
        (["--prompt", "a", "--sample", "--top-p", "1.5"], "--top-p 1.5: use a value above 0 and at most 1"),
        (["--prompt", "a", "--num-beams", "0"], "--num-beams 0: use 1 to 1000"),
        (["--prompt", "a", "--num-beams", "9999999"], "--num-beams 9999999: use 1 to 1000"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0: use 1 or more"),
        (["--chat", "--out", "{tmp}/x"], "--out: a talk on the terminal is not written"),
        (["--prompt", "a", "--out", "{tmp}"], "cannot be written"),
        (["--prompts", "{tmp}/absent"], "cannot be read as UTF-8 text"),
        (["--prompts", "{tmp}/absent.jsonl"], "absent.jsonl: cannot be read"),
        (["--prompts", "{tmp}/bad.jsonl"], "bad.jsonl: line 2: has no 'prompt': mend it, or leave the record out"),
        (["--prompts", "{tmp}/empty.txt"], "empty.txt: holds no prompt"),
        (["--prompts", "{tmp}/asked.jsonl", "--out", "{tmp}/./asked.jsonl"], "is the file of --prompts"),
    ],
)
def test_mistakes_are_named(
    trained_run: Path, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": "one"}\n{"text": "two"}\n')
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "asked.jsonl").write_text(asked := '{"prompt": "one"}\n')
    assert predict(trained_run, *[flag.format(tmp=tmp_path) for flag in flags]) == 2
    assert (tmp_path / "asked.jsonl").read_text() == asked
    assert message in capsys.readouterr().err
