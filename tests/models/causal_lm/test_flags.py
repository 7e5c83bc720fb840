"""What is trained without a configuration file."""

from __future__ import annotations

import pytest
import torch

from trunkline.engine.config.run_config import checked
from trunkline.launchers.command_line import parse
from trunkline.models.registry import config_sections


@pytest.mark.parametrize(
    ("words", "objective", "path", "preset"),
    [
        (["--store", "S"], "pretrain", None, "tiny"),
        (["--store", "S", "--model-path", "M"], "sft", "M", None),
        (["--store", "S", "--model-path", "M", "--objective", "pretrain"], "pretrain", "M", None),
        (["--store", "S", "--model-path", "M", "--objective", "dpo"], "dpo", "M", None),
        (["--store", "S", "--objective", "sft"], "sft", None, "tiny"),
    ],
)
def test_a_model_is_fine_tuned_and_without_one_a_new_one_is_trained(
    words: list[str], objective: str, path: str | None, preset: str | None
) -> None:
    model = checked(parse(["causal_lm", *words]).draft(1), config_sections).model
    assert (model.objective.type, model.preset) == (objective, preset)
    assert model.path is None if path is None else str(model.path).endswith(path)


@pytest.mark.parametrize(
    ("asked", "units", "bf16"),
    [
        ([], True, True),
        ([], False, False),
        (["--precision", "bf16"], False, True),
        (["--precision", "fp32"], True, False),
    ],
)
def test_the_precision_is_one_that_the_device_has(
    asked: list[str], units: bool, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": units})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = checked(parse(["causal_lm", "--store", "S", "--model-path", "M", *asked]).draft(1), config_sections)
    assert config.deepspeed.bf16.enabled == bf16
    assert config.origins["deepspeed.bf16.enabled"] == ("--precision" if asked else "--precision by default")
