"""Toy stores, made once, and a model that was pre-trained on them for some steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.causal_lm.toy_language import toy_config, toy_stores
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.models.registry import make_task


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stores "text", "conversations" and "preferences"."""
    return toy_stores(tmp_path_factory.mktemp("language"))


@pytest.fixture(scope="session")
def pretrained(stores: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of pre-training."""
    folder = tmp_path_factory.mktemp("pretrained")
    config = toy_config(folder, stores, training={"steps": 40, "eval_every": 20, "save_every": 40})
    Trainer(make_task(config), config, start(), folder / "run").run()
    return folder / "run"
