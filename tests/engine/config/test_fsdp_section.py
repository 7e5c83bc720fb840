"""Each key of the "deepspeed" section is obeyed by FSDP or refused by name, and the page that says which is current."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from tests.engine.tiny import tiny_config
from trunkline.engine.config.deepspeed_section import DeepSpeedSection
from trunkline.engine.config.fsdp_section import RULES, Obeyed, Refused, check_fsdp_section, document
from trunkline.engine.config.strict import validated
from trunkline.engine.config.zero_section import ZERO_STAGES, Zero
from trunkline.engine.errors import ConfigError

ROOT = Path(__file__).parents[3]


def check(section: dict[str, Any], world_size: int = 4) -> None:
    optimizer = {"type": "AdamW", "params": {"lr": 0.1}} | section.pop("optimizer", {})
    whole = {"train_batch_size": 8, "optimizer": optimizer} | section
    check_fsdp_section(validated(DeepSpeedSection, whole, "deepspeed", "run.json"), lambda key: "run.json", world_size)


ASKING: dict[str, Any] = {
    "activation_checkpointing": {"cpu_checkpointing": True},
    "aio": {"queue_depth": 9},
    "comms_logger": {"enabled": True, "verbose": True},
    "compile": {"deepcompile": True},
    "data_types": {"grad_accum_dtype": "bf16"},
    "flops_profiler": {"enabled": True},
    "timers": {"throughput": {"synchronized": False}},
    "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
    "zero_optimization.leaf_module": {"names": "experts"},
}
"""Values of objects that ask for something."""


def laid_over(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    return {key: {**first.get(key, {}), **value} if key in first else value for key, value in (first | second).items()}


def nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def test_every_key_of_the_section_has_a_rule_and_every_rule_a_key() -> None:
    def keys(model: type[BaseModel], prefix: str = "") -> set[str]:
        found = set()
        for name, field in model.model_fields.items():
            kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
            whole = prefix + name in RULES
            inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel) and not whole]
            found |= keys(inner[0], f"{prefix}{name}.") if inner else {prefix + name}
        return found

    offload = {"zero_optimization.offload_optimizer", "zero_optimization.offload_param"}
    parts = {key for key in RULES if key.rpartition(".")[0] in offload}
    known = keys(DeepSpeedSection)
    assert set(RULES) - parts == {key for key in known if key.rpartition(".")[0] not in offload}
    assert {key for key in parts if key[-1] != "*"} <= known
    assert {key.rpartition(".")[2] for key in parts} == {"device", "pin_memory", "*"}


def test_what_deepspeed_has_anyway_passes() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for name, field in DeepSpeedZeroConfig.model_fields.items():
        key = field.alias or name
        rule = RULES.get(f"zero_optimization.{key}")
        if isinstance(rule, Refused) and isinstance(field.default, (bool, int)):
            assert field.default in rule.passing, key
            check({"zero_optimization": {"stage": 1, key: field.default}})
    assert set(Zero.model_fields) - {"offload_optimizer", "offload_param"} == {
        key.removeprefix("zero_optimization.") for key in RULES if re.fullmatch(r"zero_optimization\.\w+", key)
    }


@pytest.mark.parametrize("key", [key for key, rule in RULES.items() if isinstance(rule, Refused) and "*" not in key])
def test_a_refused_key_is_named_with_what_to_use_instead(key: str) -> None:
    rule = RULES[key]
    assert isinstance(rule, Refused)
    passing = rule.passing or ({"log_level": "", "steps_per_print": 0}.get(key, {}),)
    others: dict[type, Any] = {bool: not passing[0], int: 12345, float: 2.0, str: "info", dict: ASKING.get(key)}
    other = others[type(passing[0])]
    name = key.removeprefix("zero_optimization.")
    stage = 3 if name[:6] == "stage3" else ZERO_STAGES.get(name, (1,))[0]
    base = {"zero_optimization": {"stage": stage}, "data_types": {"grad_accum_dtype": "fp32"}}
    if key[:2] in ("bf", "fp"):
        base[key[:4]] = {"enabled": True}
    with pytest.raises(ConfigError, match=rf"run.json: (.|\n)*deepspeed\.{key}[.\w]*: .*{re.escape(rule.instead)}"):
        check(laid_over(base, nested(key, other)))
    for value in rule.passing:
        check(laid_over(base, nested(key, value)))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"optimizer": {"type": "Lamb", "params": {"lr": 1}}}, "only DeepSpeed builds Lamb: use AdamW"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "not supported, .*use cpu or none"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "ratio: has no effect here: .*found 0.5",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "offload_param has no effect at stage 2: remove",
        ),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}, "3 does not divide the number of ranks, 4"),
        (
            {"zero_optimization": {"stage": 0, "zero_hpz_partition_size": 2}},
            "partition_size has no effect at stage 0",
        ),
        ({"communication_data_type": "fp8"}, "'fp32', 'bf16' or 'fp16', found \"fp8\""),
    ],
)
def test_what_cannot_be_had_is_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(section)


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check({"prescale_gradients": True, "zero_optimization": {"stage": 2, "reduce_bucket_size": 5}})
    assert "prescale_gradients" in str(caught.value)
    assert "reduce_bucket_size" in str(caught.value)


def test_a_configuration_of_record_says_no_more_than_what_it_was_made_from(tmp_path: Path) -> None:
    section = tiny_config(tmp_path).as_dict()["deepspeed"]
    assert len(section) > 8  # it writes the defaults out
    check(json.loads(json.dumps(section)))
    check({"flops_profiler": {"enabled": False, "profile_step": 3}})


def test_the_page_is_what_the_code_says() -> None:
    assert (ROOT / "docs/fsdp.md").read_text() == document()
    assert all(isinstance(rule, (Obeyed, Refused)) for rule in RULES.values())


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*/*.json")), ids=str)
def test_every_configuration_that_ships_runs_on_fsdp(path: Path) -> None:
    raw = json.loads(path.read_text())["deepspeed"]
    check_fsdp_section(DeepSpeedSection.model_validate(raw), lambda key: str(path), world_size=8)
