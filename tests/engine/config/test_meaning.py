"""Sections that mean the same are the same run, however they are spelt and from wherever they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from tests.engine.tiny import TinyData, TinyModel, TinyTask, tiny_config
from trunkline.engine.checkpoint.checkpoints import Checkpoints
from trunkline.engine.checkpoint.manifest import TRAINER
from trunkline.engine.checkpoint.resume import _check_identity
from trunkline.engine.config.meaning import HOW, FolderPath, meaning_of
from trunkline.engine.config.run_config import RunConfig, load_config
from trunkline.engine.config.strict import Strict, validated
from trunkline.engine.errors import CheckpointError, ConfigError
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.models.causal_lm.config import PRESETS, CausalLMModel
from trunkline.models.fluid.config import FluidModel


class Inner(Strict):
    cache: FolderPath | None = None


class PathModel(TinyModel):
    path: FolderPath | None = None
    inner: Inner = Inner()
    kernel: Annotated[Literal["auto", "plain"], HOW] = "auto"


def read(section: dict[str, Any]) -> PathModel:
    return validated(PathModel, section, "model", "run.json")


def test_a_path_means_the_same_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = read({"path": "base", "inner": {"cache": "./cache"}})
    assert (first.path, first.inner.cache) == (str(tmp_path / "base"), str(tmp_path / "cache"))
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    assert read(json.loads(first.model_dump_json())) == first
    assert meaning_of(read({"path": "../base", "inner": {"cache": "../cache"}})) == meaning_of(first)


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_a_path_that_is_none_is_named(path: str) -> None:
    with pytest.raises(ConfigError, match=r"run.json: model.path: give the path of a folder"):
        read({"path": path})


def test_links_presets_and_ways_of_computing_are_spellings(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert meaning_of(read({"path": str(tmp_path / "link"), "kernel": "plain"})) == meaning_of(
        read({"path": str(tmp_path / "real")})
    )
    assert meaning_of(read({"path": str(tmp_path / "real")})) != meaning_of(read({"path": str(tmp_path / "other")}))
    widths = {"d_model": 32, "num_heads": 2, "num_layers": 2, "d_ff": 128, "d_token": 32}
    assert (
        meaning_of(FluidModel(preset="nano"))
        == meaning_of(FluidModel(**widths))
        != meaning_of(FluidModel(preset="tiny"))
    )
    objective: Any = {"objective": {"type": "pretrain"}}
    one = CausalLMModel(**objective, preset="small", attention="sdpa")
    assert meaning_of(one) == meaning_of(CausalLMModel(**objective, **PRESETS["small"]._asdict()))


def config_of(folder: Path, model: dict[str, Any], optimizer: str) -> RunConfig:
    raw = json.loads(Path(tiny_config(folder, training={"steps": 2}).source).read_text())
    raw["model"], raw["deepspeed"]["optimizer"]["type"] = model, optimizer
    (folder / "run.json").write_text(json.dumps(raw))
    return load_config(folder / "run.json", sections=lambda name: (TinyData, PathModel))


@pytest.mark.parametrize("earlier_version", [False, True])
def test_a_run_spelt_otherwise_resumes_and_another_one_does_not(
    tmp_path: Path, earlier_version: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    config = config_of(tmp_path, {"path": "link", "kernel": "auto"}, "AdamW")
    Trainer(TinyTask(config.data, config.model), config, start(), tmp_path / "run").run()
    found = Checkpoints(tmp_path / "run/checkpoints", start(), keep_last=1).newest()
    assert found is not None
    if earlier_version:  # which wrote down what it read
        found.state["model"] = config.model.model_dump(mode="json") | {"path": "link"}
    else:
        assert json.loads((found.path / TRAINER).read_text())["model"]["path"] == str(tmp_path / "real")

    def compare(model: dict[str, Any], optimizer: str) -> None:
        other = config_of(tmp_path, model, optimizer)
        trainer = Trainer(TinyTask(other.data, other.model), other, start(), tmp_path / "new", resume="auto")
        _check_identity(found, trainer.assembly.identity, False, PathModel)

    compare({"path": str(tmp_path / "real"), "kernel": "plain"}, "adamw")
    compare({"path": "./real"}, "Adam")
    with pytest.raises(CheckpointError, match=r"was written with model .*real'.*but this run has .*elsewhere"):
        compare({"path": "elsewhere"}, "AdamW")
    with pytest.raises(CheckpointError, match=r"was written with optimizer 'AdamW', but this run has 'SGD'"):
        compare({"path": "link"}, "SGD")
