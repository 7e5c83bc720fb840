"""docs/first-run.md: its commands run in their order, and print what it shows, but for numbers and the precision."""

from __future__ import annotations

import re
import shlex
import signal
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, commands, read, steps
from tests.docs.programs import started
from tests.processes import wait_until
from trunkline.engine.record.metrics_file import read_metrics

PAGE = "docs/first-run.md"


def test_the_page_has_the_commands_of_readme_and_more_flags() -> None:
    asked = [
        {word.replace("MODEL", "base") for word in words} - {"3"}
        for words in commands(read("README.md"))
        if "data/chats" in words
    ]
    assert len(asked) == 3
    shown = [set(words) for words in commands(read(PAGE))]
    assert [words for words in asked if not any(words <= line for line in shown)] == []


def without_numbers(text: str) -> list[str]:
    """Its lines; what is computed in depends on the machine."""
    return re.sub(r"\d[\d.,]*(e-\d+)?|bf16|fp32", "N", text).replace("\r", "\n").splitlines()


@pytest.mark.slow
@pytest.mark.distributed
def test_every_command_prints_what_the_page_shows(tmp_path: Path) -> None:
    """The chats and the model are made, the first training is stopped, the rest runs to its end."""
    _, model, _ = (block for language, block in steps("docs/your-own-model.md") if language == "python")
    said, stopped, metrics = "", False, tmp_path / "runs/causal_lm/fine-tune/metrics.jsonl"
    for language, block in steps(PAGE):
        if language == "text":
            assert [line for line in without_numbers(block) if line not in without_numbers(said)] == [], said
            continue
        words = [sys.executable, "-c", block] if language == "python" else shlex.split(block)
        if words[0] == "git":
            continue
        if any(word.endswith("prepare.py") for word in words):
            with started([sys.executable, "-c", model], cwd=tmp_path) as process:
                process.communicate(timeout=900)
        trains = any(word.endswith("train.py") for word in words)
        words += ["--precision", "fp32"] * trains
        is_to_stop = trains and not stopped
        with started([word.replace("launchers/", f"{ROOT}/launchers/") for word in words], cwd=tmp_path) as process:
            if is_to_stop:
                wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0)
                process.send_signal(signal.SIGINT)
                stopped = True
            said = process.communicate(timeout=900)[0]
            said = said.replace(f"{ROOT}/", "").replace(" --precision fp32", "")
        assert process.returncode == (75 if is_to_stop else 0), said
    assert "It is 47." in said
    stopped_run, unbroken = (
        {row["step"]: row["loss"] for row in read_metrics(path) if row["split"] == "train" and row["step"] <= 60}
        for path in (metrics, tmp_path / "runs/unbroken/metrics.jsonl")
    )
    assert len(unbroken) == 12
    assert {step: stopped_run[step] for step in unbroken} == pytest.approx(unbroken, rel=1e-6)  # rounding grows later
