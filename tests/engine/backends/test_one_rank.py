"""One rank in fp32: every ZeRO stage and FSDP leave the model as it is, and train it as a plain loop does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.conftest import shares_nothing
from tests.engine.test_trainer import losses, reference_losses
from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.config import deepspeed_section
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer


@pytest.mark.parametrize(("backend", "stage"), [*(("deepspeed", stage) for stage in range(4)), ("fsdp", 3)])
def test_nothing_is_sharded_and_the_losses_are_a_plain_loop_s(
    backend: str, stage: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deepspeed_section, "shares_nothing", shares_nothing)
    config = tiny_config(tmp_path, training={"steps": 8}, deepspeed={"zero_optimization": {"stage": stage}})
    task = TinyTask(config.data, config.model)
    trainer = Trainer(task, config, start(), tmp_path / "run", backend=backend)
    if backend == "deepspeed":
        assert trainer.backend.engine.zero_optimization_stage() == 0  # type: ignore[attr-defined]
    else:
        assert type(trainer.backend.module) is type(task.build_model())  # fully_shard changes a module's class
    trainer.run()
    assert losses(tmp_path / "run") == pytest.approx(reference_losses(config), rel=1e-5)


@pytest.mark.parametrize(
    ("section", "world_size", "nothing"),
    [
        ({}, 1, True),
        ({}, 2, False),
        ({"bf16": {"enabled": True}}, 1, False),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, 1, False),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, 1, False),
    ],
)
def test_what_shares_nothing(section: dict, world_size: int, nothing: bool, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, deepspeed=section)
    assert shares_nothing(config.deepspeed, world_size) == nothing
