"""docs/configuration.md and the JSON Schemas: made from the models, and of one mind with them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from trunkline.engine.config.draft import Draft
from trunkline.engine.config.reference import keys
from trunkline.engine.config.run_config import checked
from trunkline.engine.errors import ConfigError
from trunkline.models.reference import files
from trunkline.models.registry import config_sections

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*/*.json"))


def schema_of(workload: str) -> dict[str, Any]:
    return json.loads((ROOT / f"configs/{workload}.schema.json").read_text())


def test_what_is_generated_is_what_the_models_say() -> None:
    for path, text in files().items():
        assert (ROOT / path).read_text() == text, f"{path}: run `python -m trunkline.models.reference`"


def test_every_key_says_what_it_means() -> None:
    for path in sorted((ROOT / "configs").glob("*.schema.json")):
        known = keys(json.loads(path.read_text()))
        assert [name for name, key in known.items() if not key.meaning or not key.kind] == []
        params = [key for name, key in known.items() if ".params." in name]
        assert len(params) > 100
        assert [key.name for key in params if not key.owners or "parameter of" in key.meaning] == []
        assert {"training.eval_every", "training.ema.decay", "deepspeed.zero_optimization.stage", "data", "model",
                "deepspeed.optimizer.params.lr", "training.parameters[].names"} <= known.keys()  # fmt: skip


def test_every_shipped_configuration_names_its_schema_and_keeps_to_it() -> None:
    assert len(SHIPPED) >= 38
    for path in SHIPPED:
        raw = json.loads(path.read_text())
        named = path.parent / raw["$schema"]
        assert named.resolve() == ROOT / f"configs/{raw['workload']}.schema.json"
        assert [error.message for error in Draft202012Validator(schema_of(raw["workload"])).iter_errors(raw)] == [], (
            path
        )


def test_a_schema_is_one_of_its_dialect() -> None:
    Draft202012Validator.check_schema(schema_of("fluid"))  # most of the others is the same


CHANGES: list[tuple[str, Any, bool]] = [  # dotted key, value (... takes it away), whether it may be so
    ("training.eval_every", {"epochs": 0.5}, True),
    ("training.eval_every", {"epoch": 1}, False),
    ("training.eval_every", 0, False),
    ("training.eval_every", 10.5, False),
    ("training.evalevery", 10, False),
    ("training.seed", "42", False),
    ("training.steps", 5, False),
    ("training.epochs", None, False),
    ("deepspeed.train_micro_batch_size_per_gpu", 0, False),
    ("deepspeed.train_micro_batch_size_per_gpu", "auto", True),
    ("training.seed", True, False),
    ("training.seed", 5e8, True),
    ("training.trackers", ["tensorbord"], False),
    ("training.best", {"metric": "mse", "mode": "lowest"}, False),
    ("training.early_stopping", {}, False),
    ("training.ema", {"decay": 1}, False),
    ("training.parameters", [{"names": ["*"], "weight_decay": 0.1}], True),
    ("training.parameters", [{"names": []}], False),
    ("training.parameters", [{"weight_decay": 0.1}], False),
    ("deepspeed.optimizer.type", "AdmW", False),
    ("deepspeed.optimizer.type", "my_package.optim:Lion", None),
    ("deepspeed.optimizer.params.lr", ..., False),
    ("deepspeed.optimizer.params.lr", -1, False),
    ("deepspeed.optimizer.params.betas", [0.9], False),
    ("deepspeed.optimizer.params.momentum", 0.9, False),
    ("deepspeed.optimizer.params.eps", "auto", True),
    ("deepspeed.scheduler.type", "Cosine", False),
    ("deepspeed.scheduler.params.warmup", 10, True),
    ("deepspeed.scheduler.params.warmups", 10, False),
    ("deepspeed.train_batch_size", "32", False),
    ("deepspeed.train_batch_size", 0, False),
    ("deepspeed.zero_optimization", {"stage": 4}, False),
    ("deepspeed.zero_optimization", {"stage": "auto"}, True),
    ("deepspeed.zero_optimization", {"cpu_offload": True}, False),
    ("deepspeed.aio", {"queue_depth": 9}, False),
    ("deepspeed.aio", {"queue_depth": 8}, True),
    ("deepspeed.elasticity", {"enabled": True}, False),
    ("deepspeed.bf16.enabled", 1, False),
    ("model.preset", "huge", False),
    ("model.rollout_minutes", 121, False),
    ("data.store", ..., False),
    ("data.store", None, False),
    ("data.history", 3.0, True),
    ("workload", "fluids", False),
    ("modle", {}, False),
    ("training", ..., False),
    ("$schema", 1, False),
    ("$schema", "https://example.org/fluid.schema.json", True),
]


def test_schema_and_models_take_and_refuse_the_same() -> None:
    whole = json.loads((ROOT / "configs/fluid/nano.json").read_text())
    validator = Draft202012Validator(schema_of("fluid"))
    for key, value, allowed in CHANGES:
        raw = copy.deepcopy(whole)
        *parents, last = key.split(".")
        target = raw
        for part in parents:
            target = target.setdefault(part, {})
        target.update({last: value}) if value is not ... else target.pop(last)
        assert validator.is_valid(raw) == (allowed is not False), (key, value)
        if allowed:
            checked(Draft(raw, "run.json"), config_sections)
        else:  # a class of a user's own is looked for by the models alone
            with pytest.raises(ConfigError):
                checked(Draft(raw, "run.json"), config_sections)
