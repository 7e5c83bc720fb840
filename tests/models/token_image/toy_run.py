"""Runs of a few steps over small stores, as the engine leaves them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.engine.tiny import lay_over
from trunkline.engine.config.run_config import load_config
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.models.registry import config_sections, make_task

SMALL = {"patch": [1, 4], "d_model": 32, "num_layers": 1, "num_heads": 2}
LEARNABLE = SMALL | {
    "block": "official", "stem": 3, "condition": False, "noise": "information", "prior": "unigram",
    "loss": "cross_entropy",
}  # fmt: skip


def said(run: Path, folder: Path, kind: str | None) -> Path:
    """A copy of a run's weights that say they were trained on data of this kind, or of none, as earlier ones do."""
    shutil.copytree(run / "best", folder, ignore=shutil.ignore_patterns("digests.json"))
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("store_kind") in ("texts", "dialogues")
    (folder / "config.json").write_text(json.dumps(config | ({} if kind is None else {"store_kind": kind})))
    return folder


def train(folder: Path, store: Path, model: dict[str, Any], **sections: dict[str, Any]) -> Path:
    """The folder of a run of some steps with images of 8 x 8."""
    raw: dict[str, Any] = {
        "workload": "token_image",
        "data": {"store": str(store), "img_size": 8, "stride": 32, "encoding": "bits"},
        "model": model,
        "training": {"steps": 4, "eval_every": 2, "save_every": 4, "log_every": 1, "trackers": []},
        "deepspeed": {
            "train_batch_size": 4,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
            "zero_optimization": {"stage": 0},
        },
    }
    lay_over(raw, sections)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    config = load_config(folder / "config.json", sections=config_sections)
    Trainer(make_task(config), config, start(), folder / "run").run()
    return folder / "run"
