"""Runs over a small store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.engine.tiny import lay_over
from trunkline.engine.config.run_config import RunConfig, load_config
from trunkline.models.registry import config_sections

SMALL = {"patch": 4, "d_model": 32, "num_layers": 2, "num_heads": 2}
DECAYED = [{"names": ["*"], "weight_decay": 0.01}]
"""As the original has it: norms and biases too."""


def run_config(folder: Path, store: Path, **sections: dict[str, Any]) -> RunConfig:
    """A run of the original recipe with these sections laid over it, through the real loader."""
    raw: dict[str, Any] = {
        "workload": "token_image",
        "data": {"store": str(store), "img_size": 16},
        "model": dict(SMALL),  # sections are laid into it
        "training": {
            "steps": 6, "eval_every": 3, "save_every": 3, "log_every": 1, "trackers": [], "parameters": DECAYED,
        },
        "deepspeed": {
            "train_batch_size": 4,
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.999], "weight_decay": 0.01}},
            "scheduler": {"type": "WarmupShape", "params": {"shape": "cosine", "warmup": 5, "start_ratio": 0.0}},
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 0},
        },
    }  # fmt: skip
    lay_over(raw, sections)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(raw))
    return load_config(path, sections=config_sections)


def losses(folder: Path) -> list[float]:
    """Of a run's training steps."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"]
