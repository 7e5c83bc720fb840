"""docs/your-own-model.md: all of its blocks, run in their order and as they stand there."""

from __future__ import annotations

import importlib.util
import json
import shlex
import signal
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.distributed import find_free_port
from tests.docs.pages import steps
from tests.docs.programs import started
from tests.processes import wait_until
from trunkline.engine.record.metrics_file import read_metrics

PAGE = "docs/your-own-model.md"


def test_the_chats_and_the_model_of_the_page_fit_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's own Python up to the model: the chats are of the form shown, the template ends each turn."""
    (shown,), (chats, model, _) = (
        [block for language, block in steps(PAGE) if language == wanted] for wanted in ("json", "python")
    )
    monkeypatch.chdir(tmp_path)
    for block in (chats, model):
        exec(block, {})
    lines = (tmp_path / "chats.jsonl").read_text().splitlines()
    assert len(lines) == 48
    assert json.loads(shown) == json.loads(lines[0])

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    text = tokenizer.apply_chat_template(json.loads(shown)["messages"], tokenize=False)
    assert text == "<|user|>What is the capital of France?<|end|><|assistant|>Paris.<|end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.slow
@pytest.mark.distributed
def test_every_block_of_the_page_runs_and_the_model_answers(tmp_path: Path) -> None:
    """The first training is interrupted, as the page says. The server is left out where its packages are not there."""
    can_serve = all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn", "openai"))
    port, answers = find_free_port(), 0
    with ExitStack() as servers:
        for language, block in steps(PAGE):
            if language == "json":
                continue
            line = shlex.split(block.replace("8000", str(port))) if language == "sh" else []
            words = line or [sys.executable, "-c", block]
            if words[0] in ("transformers", "curl") and not can_serve:
                continue
            program = started(words, cwd=tmp_path)
            if words[0] == "transformers":
                servers.enter_context(program)
                wait_until(lambda: listens(port))
                continue
            is_first_training = words[:2] == ["trunkline", "train"] and "--plan" not in words
            with program as process:
                if is_first_training:
                    wait_until((tmp_path / "runs/chats/metrics.jsonl").exists)
                    process.send_signal(signal.SIGINT)
                said = process.communicate(timeout=900)[0]
            assert process.returncode == (75 if is_first_training else 0), said
            answers += "Paris." in said
    assert answers == (3 if can_serve else 2)  # of predict, of Python, of the server
    rows = [row["step"] for row in read_metrics(tmp_path / "runs/chats/metrics.jsonl") if row["split"] == "train"]
    assert [step for step in rows if step % 10 == 0] == list(range(10, 201, 10))  # and one of the stop
    assert json.loads((tmp_path / "runs/chats/plan.json").read_text())["world_size"] == 2


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
