"""A toy store of pairs and a run over it, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.seq2seq.toy_pairs import toy_config, toy_store
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.models.registry import make_task


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of some dozens of pairs of different lengths."""
    return toy_store(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="session")
def trained_run(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of some steps: its texts differ from prompt to prompt, and few are what was expected."""
    folder = tmp_path_factory.mktemp("trained")
    training = {"steps": 60, "eval_every": 60, "save_every": 60}
    config = toy_config(folder, pairs, training=training, deepspeed={"optimizer": {"params": {"lr": 0.01}}})
    Trainer(make_task(config), config, start(), folder / "run").run()
    return folder / "run"
