"""Every mistake that a person can make in a configuration is named, with file, key, value and what to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.engine.tiny import TinyData, TinyModel, tiny_config
from trunkline.engine.config.deepspeed_section import REFUSED, DeepSpeedSection
from trunkline.engine.config.run_config import load_config
from trunkline.engine.config.zero_section import REFUSED_ZERO, Zero
from trunkline.engine.errors import ConfigError, DataError
from trunkline.engine.machine.reading import MAX_JSON_BYTES


def base(folder: Path) -> dict[str, Any]:
    return json.loads(Path(tiny_config(folder).source).read_text())


def load(path: Path, *settings: str, **keys: Any) -> Any:
    return load_config(path, sections=lambda name: (TinyData, TinyModel), settings=settings, **keys)


def changed(folder: Path, key: str, value: Any) -> Path:
    raw = base(folder)
    *parents, last = key.split(".")
    target = raw
    for part in parents:
        target = target[part]
    target[last] = value
    path = folder / "changed.json"
    path.write_text(json.dumps(raw))
    return path


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trainig", {}, "unknown key 'trainig'; did you mean 'training'?"),
        ("workload", 3, "workload: expected a name in quotes, found 3"),
        ("data", [1], r"data: expected an object {...}, found \[1\]"),
        ("data.sampels", 3, "data.sampels: unknown key; did you mean 'samples'?"),
        ("data.samples", "3", 'data.samples: .*valid integer, found "3"'),
        ("data.samples", 3.5, "data.samples: .*integer"),
        ("training.stepz", 3, "training.stepz: unknown key; did you mean 'steps'?"),
        ("training.epochs", 2, "training: give either 'epochs' or 'steps'"),
        ("training.eval_every", 0, "training.eval_every: .*greater than 0, found 0"),
        ("training.best", {"mode": "lowest"}, "training.best.mode: .*'min' or 'max', found \"lowest\""),
        ("training.early_stopping", {"patience": 3, "min_dleta": 1}, "min_dleta: unknown key; did you mean"),
        ("training.early_stopping", {}, "training.early_stopping.patience: missing"),
        ("training.trackers", ["tensorbord"], "training.trackers.0: .*'tensorboard'"),
        ("training.trackers", ["tensorboard", "tensorboard"], "training.trackers: name each tracker once"),
        ("training.compile", "inducter", "training.compile: .*no such backend; did you mean 'inductor'"),
        ("training.compile", 1, "training.compile: .*boolean, found 1"),
        ("training.log_every", True, "training.log_every: .*integer, found true"),
        ("deepspeed.train_batch_size", -8, "deepspeed.train_batch_size: .*greater than 0"),
        ("deepspeed.train_batchsize", 8, "did you mean 'train_batch_size'?"),
        ("deepspeed.train_micro_batch_size_per_gpu", 0, "must be a positive integer or \"auto\", found 0"),
        ("deepspeed.zero_optimization.stage", 4, "deepspeed.zero_optimization.stage: .*0, 1, 2 or 3, found 4"),
        ("deepspeed.zero_optimization.stage", True, "deepspeed.zero_optimization.stage: .*integer, found true"),
        ("deepspeed.optimizer.params.adam_w_mode", 1, "deepspeed.optimizer.params.adam_w_mode: .*boolean, found 1"),
        ("deepspeed.zero_optimization.overlap_com", True, "did you mean 'overlap_comm'?"),
        ("deepspeed.bf16", {"enable": True}, "deepspeed.bf16.enable: unknown key; did you mean 'enabled'?"),
        ("deepspeed.optimizer", {"params": {"lr": 1}}, "deepspeed.optimizer.type: missing"),
        ("deepspeed.optimizer", {"type": "AdamW"}, "deepspeed.optimizer.params.lr: missing"),
        ("deepspeed.elasticity", {}, "'elasticity' is not supported here: train_batch_size is the global batch"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_named(tmp_path: Path, key: str, value: Any, message: str) -> None:
    path = changed(tmp_path, key, value)
    with pytest.raises(ConfigError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("key", "value"),
    [("training.steps", 1e3), ("training.seed", 2.0), ("data.samples", 4e1), ("model.hidden", 8.0)],
)
def test_a_number_without_a_fraction_is_an_integer_in_every_section(tmp_path: Path, key: str, value: float) -> None:
    section, name = key.split(".")
    found = getattr(getattr(load(changed(tmp_path, key, value)), section), name)
    assert (found, type(found)) == (value, int)
    assert getattr(getattr(load(Path(tiny_config(tmp_path).source), f"{key}={value:e}"), section), name) == value


def test_a_known_backend_of_torch_compile_passes(tmp_path: Path) -> None:
    for name in ("inductor", "eager", "aot_eager"):
        assert tiny_config(tmp_path, training={"compile": name}).training.compile == name


def test_two_precisions_at_once_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose one precision"):
        tiny_config(tmp_path, deepspeed={"bf16": {"enabled": True}, "fp16": {"enabled": True}})


def test_all_mistakes_of_a_section_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(changed(tmp_path, "training", {"stepss": 3, "seed": -1, "steps": 5}))
    assert "stepss" in str(caught.value)
    assert "training.seed" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,}', "line 1, column [89]"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"a": NaN}', "NaN is not JSON"),
        ("[1]", r"expected a JSON object {...}, found \[1\]"),
        ("", "not JSON"),
        ("[" * 100_000, "nested more than 64 deep"),
        ('{"a": ' + "[" * 70 + "]" * 70 + "}", "nested more than 64 deep"),
        ('{"a": 1e999}', "1e999 is larger than any number"),
        ("{}", "section 'workload' is missing"),
        (b"\xff\xfe{}", "UTF-8"),
        (b" " * (MAX_JSON_BYTES + 1), "not a configuration"),
    ],
)
def test_a_file_that_is_not_a_configuration_is_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message):
        load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.json: cannot be read \(No such file"):
        load(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.seed", "expected dotted.key=value"),
        ("=3", "expected dotted.key=value"),
        ("training..seed=3", "expected dotted.key=value"),
        ("training.seed.x=3", "'training.seed' holds|training.seed: "),
        ("training.sed=3", "did you mean 'seed'"),
        ("training.seed=three", 'training.seed: .*integer, found "three"'),
    ],
)
def test_a_mistake_on_the_command_line_is_named(tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(Path(tiny_config(tmp_path, training={"seed": 1}).source), setting)


def test_the_command_line_wins_and_every_value_has_an_origin(tmp_path: Path) -> None:
    path = Path(tiny_config(tmp_path).source)
    config = load(path, "training.seed=7", 'deepspeed.optimizer.params={"lr": 0.5}', "data.poison=[1, 2]")
    assert (config.training.seed, config.data.poison) == (7, (1, 2))
    assert config.deepspeed.optimizer.params == {"lr": 0.5}
    assert config.origins["training.seed"] == "command line"
    assert config.origins["deepspeed.optimizer.params.lr"] == "command line"
    assert config.origins["training.steps"] == "file"
    assert config.origins["training.keep_last"] == "default"


def test_a_deepspeed_file_takes_the_place_of_the_section(tmp_path: Path) -> None:
    path = Path(tiny_config(tmp_path).source)
    other = tmp_path / "ds.json"
    other.write_text(json.dumps({"train_batch_size": 4, "optimizer": {"type": "SGD", "params": {"lr": 1.0}}}))
    config = load(path, deepspeed=other)
    assert (config.deepspeed.train_batch_size, config.deepspeed.scheduler) == (4, None)
    assert config.origins["deepspeed.train_batch_size"] == str(other)
    other.write_text(json.dumps({"train_batch_size": 4, "optimizr": {}}))
    with pytest.raises(ConfigError, match=r"ds.json: deepspeed.optimizr: unknown key; did you mean 'optimizer'"):
        load(path, deepspeed=other)


def test_the_configuration_of_record_loads_again_as_itself(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, deepspeed={"bf16": {"enabled": True}})
    again = tmp_path / "again.json"
    again.write_text(json.dumps(config.as_dict()))
    assert load(again).as_dict() == config.as_dict()


def test_moving_defaults_of_deepspeed_are_written_out(tmp_path: Path) -> None:
    section = tiny_config(tmp_path).as_dict()["deepspeed"]
    assert section["gradient_clipping"] == 1.0
    assert section["bf16"]["check_grad_overflow"] is True
    assert DeepSpeedSection.model_fields["gradient_clipping"].default == 0.0


def test_the_known_keys_are_those_of_the_installed_deepspeed() -> None:
    """A key that DeepSpeed reads is either known here or refused by name; none is invented."""
    import inspect
    import re

    import deepspeed.runtime.config as source
    from deepspeed.runtime import constants
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero_names = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert set(Zero.model_fields) | set(REFUSED_ZERO) == zero_names
    assert set(DeepSpeedSection.model_fields["bf16"].annotation.model_fields) == set(DeepSpeedBF16Config.model_fields)
    assert set(DeepSpeedSection.model_fields["fp16"].annotation.model_fields) == set(DeepSpeedFP16Config.model_fields)

    text = inspect.getsource(source)
    read = set(re.findall(r'param_dict(?:\.get\(|\[)"(\w+)"', text)) | set(
        re.findall(r"param_dict(?:\.get\(|\[)'(\w+)'", text)
    )
    names = re.findall(r"(?:get_scalar_param\(param_dict,|param_dict\.get\(|in param_dict)\s*([A-Z_]+)", text)
    read |= {getattr(constants, name) for name in names if isinstance(getattr(constants, name, None), str)}
    known = set(DeepSpeedSection.model_fields) | set(REFUSED)
    assert len(read) > 15
    assert read <= known


@pytest.mark.parametrize("name", ["training.json", "data.json", "model.json", "model.path"])
def test_an_error_about_a_key_names_its_origin_once_whatever_the_file_is_called(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps(base(tmp_path)))
    config = replace(load(tmp_path / name, "data.samples=7"), source=name)
    for said, named in {
        "training.parameters[0].names: match nothing": f"{name}: training.parameters[0].names: match nothing",
        "data.samples: are too few": "--set: data.samples: are too few",
        "data: there are none": f"{name} with --set data.samples: data: there are none",
        "deepspeed.optimizer: cannot be split": f"{name}: deepspeed.optimizer: cannot be split",
        "data.json: cannot be read": "data.json: cannot be read",
        "data of another run": "data of another run",
    }.items():
        with pytest.raises(DataError) as raised, config.naming_origins(), config.naming_origins():
            raise DataError(said)
        assert str(raised.value) == named
