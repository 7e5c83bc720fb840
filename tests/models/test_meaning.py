"""A checkpoint goes on with other data where that is accepted, but not with other classes, columns or tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.models.causal_lm.toy_language import toy_config as language_config
from tests.models.fluid.toy_network import SCHEMA, day
from tests.models.image_classification.tiny_pictures import picture_config, picture_folder
from tests.models.seq2seq.toy_pairs import SILENT, toy_config, toy_store
from tests.models.token_image.runs import run_config
from trunkline.engine.config.run_config import RunConfig, load_config
from trunkline.engine.errors import CheckpointError
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.models.causal_lm.prepare import prepare as prepare_language
from trunkline.models.fluid.schema import Schema
from trunkline.models.fluid.store_writer import write_store
from trunkline.models.registry import config_sections, make_task
from trunkline.models.seq2seq.prepare import prepare
from trunkline.models.token_image.prepare import prepare as prepare_images

SHORT = {"steps": 2, "eval_every": 2, "save_every": 2}
Changed = tuple[RunConfig, RunConfig]
"""A run, and the same over data that mean something else and have the same sizes."""


def classes(folder: Path) -> Changed:
    images = [picture_folder(folder / name) for name in ("one", "two")]
    for split in ("train", "val"):
        (images[1] / split / "dark").rename(images[1] / split / "dim")
    one, two = (picture_config(folder, each, {"arch": "resnet_tiny", "batch_norm_group": 16}, training=SHORT)
                for each in images)  # fmt: skip
    return one, two


def fluid(folder: Path, schema: Schema = SCHEMA, **data: Any) -> RunConfig:
    splits = {split: {"case_0001": day(seed, 60)} for seed, split in enumerate(("train", "val", "test"))}
    store = write_store(folder / "store", schema, splits)
    raw = {
        "workload": "fluid",
        "data": {"store": str(store.root), **data},
        "model": {"preset": "nano"},
        "training": SHORT | {"trackers": [], "best": {"metric": "mse"}},
        "deepspeed": {"train_batch_size": 4, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
    }
    (folder / "run.json").write_text(json.dumps(raw))
    return load_config(folder / "run.json", sections=config_sections)


def columns(folder: Path) -> Changed:
    swapped = replace(SCHEMA, groups=SCHEMA.groups | {"N": SCHEMA.groups["N"][::-1]})
    return fluid(folder / "one"), fluid(folder / "two", swapped)


def units(folder: Path) -> Changed:
    """The network keeps those that it was trained in, and its errors would be measured in others."""
    return fluid(folder / "one"), fluid(folder / "two", normalization="minmax")


def events(folder: Path) -> Changed:
    """An epoch has other samples, of other weights."""
    return fluid(folder / "one"), fluid(folder / "two", event_repeats=3)


def tokens(folder: Path) -> Changed:
    store = toy_store(folder)
    records = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    other = [{"prompt": record["response"] * 2, "response": record["prompt"]} for record in records]
    (folder / "other.jsonl").write_text("".join(json.dumps(record) + "\n" for record in other))
    prepare([folder / "other.jsonl"], folder / "other", vocab_size=400, val_fraction=0.2)
    training = SHORT | {"steps": 3}
    return tuple(toy_config(folder, each, model=SILENT, training=training) for each in (store, folder / "other"))  # type: ignore[return-value]


@pytest.mark.fault("another data set, accepted, whose {made} are others")
@pytest.mark.parametrize("made", [classes, columns, units, events, tokens], ids=lambda made: made.__name__)
def test_a_checkpoint_fits_no_data_that_mean_something_else(tmp_path: Path, made: Callable[[Path], Changed]) -> None:
    """Whether other data are accepted or not, it is named what they mean, since no flag makes them fit."""
    config, other = made(tmp_path)
    Trainer(make_task(config), config, start(), tmp_path / "run").run()
    named = {
        "classes": r"classes\[1\] \['dark'\], but this run has \['dim'\]",
        "columns": "columns '",
        "units": "data.normalization 'standard', but this run has 'minmax'",
        "events": "data.event_repeats 1, but this run has 3",
        "tokens": "vocabulary '",
    }[made.__name__]
    for accepted in (False, True):
        with pytest.raises(CheckpointError, match=f"was written with {named}.*; make them equal, or start afresh"):
            Trainer(make_task(other), other, start(), tmp_path / "run", resume="auto", accept_new_data=accepted)


def causal_lm(folder: Path, texts: Path) -> RunConfig:
    prepare_language([texts], folder / "text", kind="text", vocab_size=300, val_fraction=0.2, workers=1)
    return language_config(folder, folder)


def token_image(folder: Path, texts: Path) -> RunConfig:
    store, _ = prepare_images([texts], folder / "store", vocab_size=300, val_fraction=0.2)
    return run_config(folder, store.root)


@pytest.mark.parametrize("made", [causal_lm, token_image], ids=lambda made: made.__name__)
def test_a_task_s_meaning_is_its_vocabulary(tmp_path: Path, made: Callable[[Path, Path], RunConfig]) -> None:
    meanings = []
    for words in ("a gas network", "the pressure falls"):
        (folder := tmp_path / words[0]).mkdir()
        records = [json.dumps({"text": f"{words} {number}"}) for number in range(40)]
        (folder / "texts.jsonl").write_text("\n".join(records))
        meanings.append(make_task(made(folder, folder / "texts.jsonl")).meaning())
    assert meanings[0].keys() == {"vocabulary"}
    assert meanings[0] != meanings[1]
