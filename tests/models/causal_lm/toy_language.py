"""Small stores of real English, and runs over them: what the tests of the language models' tasks work on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.engine.tiny import lay_over
from trunkline.engine.config.run_config import RunConfig, load_config
from trunkline.models.causal_lm.examples import write_examples
from trunkline.models.causal_lm.prepare import prepare
from trunkline.models.registry import config_sections

SHAPE = {
    "vocab_size": 512, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 48,
}  # fmt: skip


def toy_stores(folder: Path) -> Path:
    """Stores "text", "conversations" and "preferences" in `folder`, of some dozens of records each, one tokenizer."""
    write_examples(folder / "example")
    for kind in ("text", "conversations", "preferences"):
        lines = (folder / f"example/{kind}.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines[:70]]
        if kind == "text":
            records = [{"text": record["text"][: 60 + 37 * place % 900]} for place, record in enumerate(records)]
        source = folder / f"{kind}.jsonl"
        source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        learned = {"vocab_size": 512} if kind == "text" else {"tokenizer": folder / "text/tokenizer"}
        prepare([source], folder / kind, kind=kind, val_fraction=0.2, workers=1, **learned)
    return folder


def toy_config(folder: Path, stores: Path, objective: str = "pretrain", **sections: dict[str, Any]) -> RunConfig:
    """A run with these sections laid over the defaults, through the real loader."""
    kind = {"pretrain": "text", "sft": "conversations", "dpo": "preferences"}[objective]
    raw: dict[str, Any] = {
        "workload": "causal_lm",
        "data": {"store": str(stores / kind), "max_length": 64},
        "model": {"objective": {"type": objective}},
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
    params = raw["deepspeed"]["scheduler"]["params"]
    params["warmup"] = min(params.get("warmup", 0), raw["training"]["steps"])
    if "path" not in raw["model"]:
        raw["model"] = SHAPE | raw["model"]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{objective}.json"
    path.write_text(json.dumps(raw))
    return load_config(path, sections=config_sections)
