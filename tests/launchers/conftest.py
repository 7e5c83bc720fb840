"""A small finished run of the fluid workload, made once for all tests of the launchers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.models.fluid.toy_network import write_toy_store
from trunkline.launchers import train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a toy store, a configuration, and a finished run of it."""
    folder = tmp_path_factory.mktemp("toy")
    write_toy_store(folder / "store")
    config = json.loads((ROOT / "configs/fluid/nano.json").read_text())
    config["data"] |= {"store": str(folder / "store"), "history": 2}
    config["training"] |= {
        "steps": 6,
        "epochs": None,
        "eval_every": 3,
        "eval_samples": 16,
        "save_every": 3,
        "log_every": 1,
    }
    config["training"] |= {"num_workers": 0, "trackers": []}
    config["training"].pop("epochs")
    config["deepspeed"] |= {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8, "bf16": {"enabled": False}}
    config["deepspeed"]["zero_optimization"] = {"stage": 1}
    (folder / "config.json").write_text(json.dumps(config))
    assert train.main(["--config", str(folder / "config.json"), "--output-dir", str(folder / "run")]) == 0
    return folder
