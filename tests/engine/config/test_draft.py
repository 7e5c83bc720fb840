"""Values on top of one another, and what a message about each of them begins with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trunkline.engine.config.draft import Draft
from trunkline.engine.errors import ConfigError


@pytest.fixture
def draft(tmp_path: Path) -> Draft:
    path = tmp_path / "run.json"
    values = {"training": {"seed": 1, "best": {}}, "deepspeed": {"optimizer": {"type": "Adam", "params": {"lr": 1}}}}
    path.write_text(json.dumps(values))
    return Draft.read(path)


def test_the_last_value_counts_and_its_origin_is_kept(draft: Draft) -> None:
    draft.assign("training.seed", 2, "--seed")
    draft.assign("training.best.metric", "mse", "--metric")
    draft.set('deepspeed.optimizer={"type": "SGD"}')
    draft.set("training.note=plain text")
    assert draft.values == {
        "training": {"seed": 2, "best": {"metric": "mse"}, "note": "plain text"},
        "deepspeed": {"optimizer": {"type": "SGD"}},
    }
    assert draft.origins == {
        "training.seed": "--seed", "training.best.metric": "--metric",
        "deepspeed.optimizer.type": "command line", "training.note": "command line",
    }  # fmt: skip


def test_a_message_begins_with_where_the_value_is_from(draft: Draft) -> None:
    draft.set("training.seed=3")
    draft.assign("deepspeed.optimizer.params.lr", 2, "--lr0")
    draft.assign("deepspeed.bf16", {}, "--amp")
    file = draft.source
    assert draft.where("training.seed") == "--set"
    assert draft.where("training.seed.x") == "--set"
    assert draft.where("training.best.metric") == file
    assert draft.where("deepspeed.optimizer.type") == file
    assert draft.where("deepspeed.optimizer.params") == "--lr0"
    assert draft.where("deepspeed.optimizer.params.betas") == "--lr0"
    assert draft.where("deepspeed.bf16.enabled") == "--amp"
    assert draft.where("deepspeed") == f"{file} with --lr0, --amp"
    assert draft.where("training") == f"{file} with --set training.seed"
    assert draft.where("model") == file


def test_a_deepspeed_file_answers_for_its_section(draft: Draft, tmp_path: Path) -> None:
    other = tmp_path / "ds.json"
    other.write_text('{"train_batch_size": 8, "bf16": {"enabled": true}}')
    both = Draft.read(draft.source, other)
    both.set("deepspeed.bf16.enabled=false")
    assert both.values["deepspeed"] == {"train_batch_size": 8, "bf16": {"enabled": False}}
    assert both.where("deepspeed.train_batch_size") == str(other)
    assert both.where("deepspeed") == f"{other} with --set deepspeed.bf16.enabled"
    assert both.where("training.seed") == draft.source


def test_a_schema_for_editors_is_passed_over() -> None:
    draft = Draft({"$schema": "../fluid.schema.json", "training": {"seed": 1}}, "run.json")
    assert (draft.values, draft.origins) == ({"training": {"seed": 1}}, {"training.seed": "file"})
    with pytest.raises(ConfigError, match=r"^run.json: \$schema: expected a path or an address, found 1$"):
        Draft({"$schema": 1}, "run.json")


@pytest.mark.parametrize(("origin", "who"), [("--seed", "--seed"), ("command line", "--set training.seed.x")])
def test_a_value_that_has_no_keys_is_named(draft: Draft, origin: str, who: str) -> None:
    with pytest.raises(ConfigError, match=f"^{who}: 'training.seed' holds 1, which has no keys; set 'training.seed' "):
        draft.assign("training.seed.x", 1, origin)
