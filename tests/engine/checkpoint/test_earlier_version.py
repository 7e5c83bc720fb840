"""Checkpoints of an earlier version, or of an earlier form of the task, which say less of themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.checkpoint.resume import UNSAID, Probe
from trunkline.engine.errors import CheckpointError
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer

SHORT = {"steps": 2, "eval_every": 2, "save_every": 2}


class Meant(TinyTask):
    said: ClassVar[dict[str, Any]] = {}

    def meaning(self) -> dict[str, Any]:
        return self.said


def prepared(folder: Path, resume: str = "none", **training: Any) -> Trainer:
    config = tiny_config(folder, training=SHORT | training)
    return Trainer(Meant(config.data, config.model), config, start(), folder / "run", resume=resume)


@pytest.mark.parametrize("earlier", [True, False])
def test_a_probe_of_another_generator_is_not_compared_and_a_line_says_so(
    earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = prepared(tmp_path)
    if earlier:
        for key in UNSAID:
            del before.assembly.identity[key]
    with monkeypatch.context() as patched:
        patched.setattr(Probe, "loss", lambda self: 123.0)
        before.run()
    if earlier:
        assert prepared(tmp_path, "auto", steps=4).progress.step == 2
        assert "is of another version, which drew normal random numbers otherwise" in capsys.readouterr().out
    else:
        with pytest.raises(CheckpointError, match="probe sample was 123"):
            prepared(tmp_path, "auto", steps=4)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({}, None),
        ({"more": 1, "classes": ["a", "b"]}, None),
        ({"classes": ["a", "c"]}, r"with classes\[1\] \['b'\], but this run has \['c'\]; make them equal"),
        ({"classes": ["a"]}, r"with classes\[1\] \['b'\], but this run has \[\]"),
        ({"classes": "a"}, r"with classes \['a', 'b'\], but this run has 'a'"),
    ],
)
def test_what_data_mean_is_compared_in_what_both_say(
    said: dict[str, Any], message: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Meant, "said", {"classes": ["a", "b"]})
    prepared(tmp_path).run()
    monkeypatch.setattr(Meant, "said", said)
    if message is None:
        assert prepared(tmp_path, "auto", steps=4).progress.step == 2
    else:
        with pytest.raises(CheckpointError, match=message):
            prepared(tmp_path, "auto", steps=4)


def test_a_remembered_micro_batch_of_an_earlier_version_is_kept(tmp_path: Path) -> None:
    facts = prepared(tmp_path).micro.facts
    assert not facts.keys() & set(UNSAID)
