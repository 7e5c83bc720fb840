"""What is trained without a configuration file."""

from __future__ import annotations

import pytest

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
