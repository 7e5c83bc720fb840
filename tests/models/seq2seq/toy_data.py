"""Small stores of made-up pairs and texts, and runs over them: what the tests of data and its order work on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.engine.tiny import lay_over
from trunkline.engine.config.run_config import RunConfig, load_config
from trunkline.models.registry import config_sections
from trunkline.models.seq2seq.prepare import prepare

SHAPE = {
    "vocab_size": 448, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2,
    "feed_forward_proj": "relu", "dropout": 0.0,
}  # fmt: skip
WORDS = ["pipe", "carries", "gas", "from", "station", "each", "town", "and", "pressure", "falls", "along", "it"]


def made_up(count: int, seed: int = 0, most: int = 24) -> list[str]:
    """Texts of one word to `most`, log-normal in length."""
    rng = np.random.default_rng(seed)
    sizes = np.clip(rng.lognormal(1.5, 0.9, count), 1, most).astype(int)
    return [" ".join(rng.choice(WORDS, size)) for size in sizes]


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def toy_store(folder: Path, kind: Any, count: int = 120) -> Path:
    """A store of `count` records, with a tokenizer of its own that has 100 sentinels."""
    prompts, responses = made_up(count, 1), made_up(count, 2)
    records: list[Any] = [{"text": f"{a}. {b}"} for a, b in zip(prompts, responses)]
    if kind == "pairs":
        records = [{"prompt": a, "response": b} for a, b in zip(prompts, responses)]
    source = write_lines(folder / f"{kind}.jsonl", *records)
    prepare([source], folder / kind, kind=kind, vocab_size=SHAPE["vocab_size"], val_fraction=0.2)
    return folder / kind


def toy_run(folder: Path, store: Path, **sections: dict[str, Any]) -> RunConfig:
    """A run over a store of toy_store with these sections laid over the defaults, through the real loader."""
    objective = "span_corruption" if store.name == "text" else "pairs"
    raw: dict[str, Any] = {
        "workload": "seq2seq",
        "data": {"store": str(store), "max_source_length": 32, "max_target_length": 32},
        "model": SHAPE | {"objective": {"type": objective}},
        "training": {"steps": 6, "eval_every": 3, "save_every": 3, "log_every": 1, "trackers": []},
        "deepspeed": {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 4,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.003, "weight_decay": 0.0}},
            "zero_optimization": {"stage": 0},
        },
    }
    lay_over(raw, sections)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
    path.write_text(json.dumps(raw))
    return load_config(path, sections=config_sections)
