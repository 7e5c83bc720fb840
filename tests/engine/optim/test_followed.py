"""What a resume says of the schedule: nothing where it is the same, else what changed, and the rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer

ADAMW = {"type": "AdamW", "params": {"lr": 0.001}}


def run(folder: Path, backend: str, capsys: pytest.CaptureFixture[str], **training: Any) -> list[str]:
    """The notes of a run of the tiny task that resumes whatever is there."""
    schedule = training.pop("schedule", {"type": "WarmupLinear", "params": {"warmup": 0}})
    section = {"optimizer": ADAMW, "scheduler": schedule}
    config = tiny_config(folder, training={"steps": 4, "save_every": 2, **training}, deepspeed=section)
    capsys.readouterr()
    Trainer(TinyTask(config.data, config.model), config, start(), folder / "run", backend=backend, resume="auto").run()
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: a new schedule")]


@pytest.mark.parametrize("backend", ["deepspeed", "fsdp"])
def test_only_another_schedule_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str) -> None:
    assert run(tmp_path, backend, capsys) == []
    assert run(tmp_path, backend, capsys) == []
    assert run(tmp_path, backend, capsys, steps=9) == [
        "note: a new schedule holds from step 4 on, steps 4 -> 9: the rate there is 0.0005, it would have been 0"
    ]
    (said,) = run(tmp_path, backend, capsys, steps=12, schedule={"type": "InverseSqrt", "params": {"warmup": 1}})
    assert "steps 9 -> 12, scheduler {" in said
    assert said.endswith("the rate there is 0.000333, it would have been 0")
