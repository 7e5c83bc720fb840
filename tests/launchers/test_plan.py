"""--plan without data: what the configuration alone says is right, and what only data say is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.config.run_config import load_config
from trunkline.engine.errors import ConfigError
from trunkline.engine.plan import make_plan, planned_batches
from trunkline.engine.plan_text import render_summary
from trunkline.launchers import train
from trunkline.models.registry import config_sections, weights_task

CONFIGS = Path(train.__file__).parents[1] / "configs"


@pytest.fixture(autouse=True)
def no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without data sets: a clone has some after `make train`."""
    monkeypatch.chdir(tmp_path)


def plan_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert train.main([*words, "--plan", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def llama(vocab: int, d: int, layers: int, heads: int, kv: int, ff: int) -> int:
    """Parameters of a Llama with a tied head."""
    block = 2 * d * d + 2 * d * (d // heads) * kv + 3 * d * ff + 2 * d
    return vocab * d + layers * block + d


def t5(vocab: int, d: int, layers: tuple[int, int], inner: int, heads: int, ff: int) -> int:
    """Parameters of a tied T5 with a gated feed-forward, and 32 buckets of relative positions a side."""
    attention, feed = 4 * d * inner + d, 3 * d * ff + d
    return vocab * d + layers[0] * (attention + feed) + layers[1] * (2 * attention + feed) + 2 * d + 2 * 32 * heads


SMALL_PAGES = ["data.encoding=rgb", "model.loss=x", "model.prior=none", "model.noise=linear"]


def test_sizes_come_from_the_configuration_alone(capsys: pytest.CaptureFixture[str]) -> None:
    for name, settings, parameters in (
        ("causal_lm/demo", [], llama(4096, 128, 4, 4, 1, 384)),
        ("seq2seq/demo", [], t5(512, 128, (3, 2), 128, 4, _feed_forward())),
        ("image_classification/resnet18", [], 11_689_512 - 998 * 513),  # torchvision's, with 2 classes for 1,000
        ("token_image/demo", SMALL_PAGES, None),
    ):
        flags = [word for setting in settings for word in ("--set", setting)]
        plan = plan_of(capsys, "--config", name, "--samples", "6400", *flags)
        assert plan["unknown"] == {}, name
        assert plan["parameters"] == parameters or parameters is None, name
        assert plan["train_samples"] == 6400
        assert plan["steps_per_epoch"] == -(-6400 // plan["global_batch_size"])
        assert plan["memory_bytes"]["activations"] > 0, name
        assert plan["learning_rate"]["step 0"] >= 0


def _feed_forward() -> int:
    from trunkline.models.seq2seq.config import PRESETS

    return PRESETS["tiny"].d_ff


def test_the_classes_of_images_are_said_to_be_assumed(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--config", "image_classification/resnet18", "--samples", "6400", "--plan"]) == 0
    said = capsys.readouterr().out
    assert "note: the number of classes is unknown without data: this is of 2; each further one adds 513 para" in said


def test_what_only_data_say_is_named_with_the_way_to_know_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--config", "fluid/tiny", "--plan"]) == 0
    said = capsys.readouterr().out
    assert "fluid: a number of parameters that is unknown\n" in said
    assert "steps       unknown, 10 epochs\n" in said
    assert "unknown     steps and learning rates; parameters, memory and checkpoint: " in said
    assert "no prepared data set here (no store.json): make one with `python launchers/prepare.py fluid" in said
    assert "--samples N stands in for the number of training samples" in said
    plan = plan_of(capsys, "--config", "fluid/demo")
    assert (plan["steps"], plan["epochs"], plan["parameters"]) == (16000, None, None)
    assert plan["learning_rate"]["last (step 15999)"] == pytest.approx(0, abs=1e-6)
    assert plan["unknown"].keys() == {"epochs", "parameters, memory and checkpoint"}
    plan = plan_of(capsys, "--config", "fluid/demo", "--samples", "2560")
    assert (plan["epochs"], plan["unknown"].keys()) == (1600, {"parameters, memory and checkpoint"})
    plan = plan_of(capsys, "--config", "token_image/demo", "--samples", "6400")
    assert plan["parameters"] is None  # bits, and the logits of a vocabulary that is not known


@pytest.mark.parametrize(
    ("name", "settings", "shapes"),
    [
        ("causal_lm/tiny", [], {"input_ids": [1, 512], "document": [1, 512]}),
        ("causal_lm/tiny", ["data.packing=false"], {"input_ids": [1, 512], "targets": [1, 512]}),
        ("seq2seq/chat", [], {"input_ids": [1, 256], "targets": [1, 256]}),
        ("seq2seq/chat", ["data.packing=true", "data.packed_source_length=512", "data.packed_target_length=320"],
         {"input_ids": [1, 512], "targets": [1, 320]}),
        ("seq2seq/t5-base-span-corruption", [], {"input_document": [1, 512], "target_document": [1, 114]}),
        ("token_image/b4", [], {"tokens": [1, 64 * 64]}),
        ("image_classification/demo", [], {"image": [1, 48, 48, 3]}),
    ],
)  # fmt: skip
def test_the_largest_sample_fills_what_the_configuration_allows(
    name: str, settings: list[str], shapes: dict[str, list[int]]
) -> None:
    config = load_config(CONFIGS / f"{name}.json", sections=config_sections, settings=settings)
    task = weights_task(config)
    batch = task.collate([task.largest_sample()])
    assert {key: list(batch[key].shape) for key in shapes} == shapes
    batch |= {"valid": torch.ones(1, dtype=torch.bool), "draw": torch.zeros(1, dtype=torch.int64)}
    assert int(task.weight(batch)) > 0


def test_what_a_run_says_of_this_processor_stands_in_its_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # a processor without units for bf16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = ["--config", "causal_lm/demo", "--samples", "1000", "--set", "deepspeed.bf16.enabled=true"]
    (note,) = (note for note in plan_of(capsys, *words)["notes"] if note.startswith("this processor computes in bf16"))
    assert train.main([*words, "--plan"]) == 0
    assert capsys.readouterr().out.count(f"note: {note}\n") == 1


@pytest.mark.parametrize("backend", ["fsdp", "auto"])
def test_what_the_backend_does_not_do_is_named_without_data_too(
    backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    key = {"fsdp": "reduce_bucket_size", "auto": "zero_hpz_partition_size"}[backend]
    flags = ["--backend", backend, "--set", f"deepspeed.zero_optimization.{key}=9"]
    flags += ["--set", "deepspeed.zero_optimization.stage=2"]
    assert train.main(["--config", "fluid/tiny", *flags, "--plan"]) == 2
    without = capsys.readouterr().err
    assert f"deepspeed.zero_optimization.{key}: 9 has no effect" in without
    assert train.main(["--config", "fluid/tiny", *flags, "--plan", "--samples", "5000"]) == 2
    assert capsys.readouterr().err == without


def test_a_run_of_few_steps_is_told_how_to_be_longer(tmp_path: Path) -> None:
    def notes(samples: int, batch: int, **training: Any) -> list[str]:
        config = tiny_config(tmp_path, training=training, deepspeed={"train_batch_size": batch})
        task = TinyTask(config.data, config.model)
        plan = make_plan(task, config, 1, task.build_model(), samples=samples)
        assert all(f"note: {note}" in render_summary(plan) for note in plan["notes"])
        return [note for note in plan["notes"] if "few models" in note]

    assert notes(218, 64, epochs=3, steps=None) == [
        "218 samples at batch 64 are 4 steps an epoch, 12 in all: few models learn much in fewer than 100 steps. To "
        "train for longer, lower deepspeed.train_batch_size, or raise training.epochs (25 are 100 steps)"
    ]
    assert notes(218, 64, steps=99, epochs=None)[0].endswith("To train for longer, raise training.steps to 100 or more")
    assert notes(218, 64, steps=100, epochs=None) == notes(218, 8, epochs=4, steps=None) == []


class InGroups(TinyTask):
    micro_batch_multiple = 4


@pytest.mark.parametrize(
    ("task_class", "sizes", "way_out"),
    [
        (TinyTask, {}, "40"),
        (InGroups, {}, "40"),
        (TinyTask, {"gradient_accumulation_steps": 8}, "32"),
        (InGroups, {"gradient_accumulation_steps": 4}, "32"),
        (TinyTask, {"train_micro_batch_size_per_gpu": 64}, "128"),
        (TinyTask, {"train_micro_batch_size_per_gpu": 64_000}, "less, in fewer or smaller micro-batches"),
    ],
)
def test_the_way_out_of_a_global_batch_of_fillers_is_one(
    tmp_path: Path, task_class: type[TinyTask], sizes: dict[str, int | str], way_out: str
) -> None:
    sizes = {"train_micro_batch_size_per_gpu": "auto"} | sizes
    config = tiny_config(tmp_path, deepspeed=sizes | {"train_batch_size": 128_000})
    task = task_class(config.data, config.model)
    with pytest.raises(ConfigError) as refused:
        planned_batches(task, config, 2, samples=41)
    said = "deepspeed.train_batch_size: 128000 samples, where the training split has 41; at most 1,000 times as many "
    assert str(refused.value) == f"{said}are taken: use {way_out}"
    if way_out.isdigit():
        config = tiny_config(tmp_path, deepspeed=sizes | {"train_batch_size": int(way_out)})
        assert planned_batches(task, config, 2, samples=41).global_batch_size == int(way_out)
