"""A small store of pairs, and runs over it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.engine.tiny import lay_over
from trunkline.engine.config.run_config import RunConfig, load_config
from trunkline.models.registry import config_sections
from trunkline.models.seq2seq.prepare import prepare

VOCAB_SIZE = 400
SHAPE = {
    "vocab_size": VOCAB_SIZE, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2,
    "num_heads": 4, "feed_forward_proj": "relu",
}  # fmt: skip
_WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
SILENT = {"generation": {"samples": 0}}
"""Of the model's section: losses alone are validated, which is most of the time of a small run."""


def toy_store(folder: Path) -> Path:
    """A store in `folder`: words of numbers, and the numbers in digits."""
    random.seed(0)
    drawn = [[random.randrange(12) for _ in range(1 + place % 9)] for place in range(80)]
    records = [
        {"prompt": " ".join(_WORDS[n] for n in numbers), "response": " ".join(str(n + 1) for n in numbers)}
        for numbers in drawn
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    prepare([folder / "pairs.jsonl"], folder / "store", vocab_size=VOCAB_SIZE, val_fraction=0.2)
    return folder / "store"


def toy_config(folder: Path, store: Path, **sections: dict[str, Any]) -> RunConfig:
    """A run with these sections laid over the defaults, through the real loader."""
    raw: dict[str, Any] = {
        "workload": "seq2seq",
        "data": {"store": str(store), "max_source_length": 64, "max_target_length": 32},
        "model": {"objective": {"type": "pairs"}, "dropout": 0.0},
        "training": {"steps": 6, "eval_every": 3, "save_every": 3, "log_every": 1, "trackers": []},
        "deepspeed": {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 4,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.003, "weight_decay": 0.01}},
            "scheduler": {"type": "WarmupCosine", "params": {"warmup": 2}},
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 0},
        },
    }
    lay_over(raw, sections)
    if "path" not in raw["model"]:
        raw["model"] = SHAPE | raw["model"]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(raw))
    return load_config(path, sections=config_sections)
