"""--is_keep_training: everything is resumed, and a new length and rate hold from the present step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.models.seq2seq.toy_pairs import SILENT, toy_config
from trunkline.engine.config.deepspeed_section import Scheduler
from trunkline.engine.config.run_config import RunConfig, checked
from trunkline.engine.data.order import FILLER, GlobalBatches
from trunkline.engine.data.randomness import seed_torch
from trunkline.engine.errors import CheckpointError, ConfigError
from trunkline.engine.optim.schedules import learning_rates
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.launchers.command_line import parse
from trunkline.launchers.train import main as launch
from trunkline.models.registry import config_sections, make_task

AN_EPOCH, WARMUP = 9, 2


def config_of(folder: Path, pairs: Path, section: dict[str, Any] | None = None, **training: Any) -> RunConfig:
    settings = {"steps": None, "epochs": 1, "eval_every": 3, "save_every": 9, **training}
    plain = {"type": "AdamW", "params": {"lr": 0.003, "weight_decay": 0.0}}
    section = {"optimizer": plain, "train_micro_batch_size_per_gpu": 8} | (section or {})
    return toy_config(folder, pairs, model=SILENT, training=settings, deepspeed=section)


def train(folder: Path, *words: str) -> None:
    """What the launcher does with these words, without its report."""
    command = parse(["--config", str(folder / "config.json"), *words])
    config = checked(command.draft(1), config_sections)
    resume = str(folder / "run") if command.arguments.resume is True else command.arguments.resume or "none"
    Trainer(make_task(config), config, start(), folder / "run", resume=resume).run()


def rows(folder: Path, split: str) -> list[dict[str, float]]:
    lines = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["split"] == split]


def rate(step: int, lr: float, total: int) -> float:
    """WarmupCosine's, by its formula."""
    progress = max(0, step - WARMUP) / (total - 1 - WARMUP)
    return lr * min(1.0, (step + 1) / (WARMUP + 1)) * 0.5 * (1 + math.cos(math.pi * progress))


def by_hand(config: RunConfig, rates: list[float]) -> list[float]:
    """The losses of a loop of torch alone, at these rates, over the samples of each step."""
    task: Any = make_task(config)
    seed_torch(config.training.seed, 0)
    model, dataset = task.build_model(), task.dataset("train")
    batches = GlobalBatches(len(dataset), 8, config.training.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.0)
    losses = []
    for step, lr in enumerate(rates):
        chosen = [dataset[place] for place in batches.samples(step) if place != FILLER]
        batch = task.collate(chosen) | {"valid": torch.ones(len(chosen), dtype=torch.bool)}
        loss = task.loss(model, batch)["loss"] / task.weight(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.fault("keep-training that starts over, or keeps the old rate and length")
def test_a_new_length_and_rate_hold_from_the_present_step(
    pairs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path, pairs)
    train(tmp_path)
    capfd.readouterr()
    more = ["--is_keep_training=True", "--epochs=2", "--learn_rate", "0.001"]
    train(tmp_path, *more)
    said = capfd.readouterr().out
    then, old = rate(9, 0.001, 18), rate(8, 0.003, 9)
    assert old == 0.0
    assert (
        f"note: a new schedule holds from step 9 on, steps 9 -> 18, lr 0.003 -> 0.001: the rate there is {then:.3g}, "
        "it would have been 0" in said
    )
    rates = [rate(step, 0.003, 9) for step in range(9)] + [rate(step, 0.001, 18) for step in range(9, 18)]
    logged = rows(tmp_path, "train")
    assert [row["step"] for row in logged] == list(range(1, 19))
    assert [row["lr"] for row in logged] == pytest.approx(rates, rel=1e-12, abs=1e-18)
    assert [row["loss"] for row in logged] == pytest.approx(by_hand(config, rates), rel=1e-5)

    weights = load_file(tmp_path / "run/final/model.safetensors")
    train(tmp_path, *more)  # a second time: it is done, and stays as it is
    assert "a new schedule" not in capfd.readouterr().out
    assert rows(tmp_path, "train") == logged
    again = load_file(tmp_path / "run/final/model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)

    train(tmp_path, *more, "--epochs=3")  # and a third, for longer
    third = rows(tmp_path, "train")[18:]
    assert [row["step"] for row in third] == list(range(19, 28))
    assert [row["lr"] for row in third] == pytest.approx([rate(step, 0.001, 27) for step in range(18, 27)], abs=1e-18)
    with pytest.raises(CheckpointError, match="is at step 27, past this run's last step 9"):
        train(tmp_path, *more, "--epochs=1")
    with pytest.raises(ConfigError, match="of an earlier run; resume with --resume auto"):
        train(tmp_path, "--is_keep_training=false", "--epochs=4")


def run(config: RunConfig, folder: Path) -> None:
    Trainer(make_task(config), config, start(), folder / "run", resume="auto").run()


def test_the_best_and_the_patience_are_kept(pairs: Path, tmp_path: Path) -> None:
    settings = {"early_stopping": {"patience": 5, "min_delta": 100}}
    run(config_of(tmp_path, pairs, **settings), tmp_path)
    weights = load_file(tmp_path / "run/best/model.safetensors")
    too_fast = {"type": "AdamW", "params": {"lr": 30.0, "weight_decay": 0.0}}
    run(config_of(tmp_path, pairs, {"optimizer": too_fast}, epochs=3, **settings), tmp_path)
    losses = {int(row["step"]): row["loss"] for row in rows(tmp_path, "val")}
    assert list(losses) == [3, 6, 9, 12, 15, 18], "those of step 6 to 18 are five without a gain"
    assert min(losses, key=lambda step: losses[step]) == 9, "which is of the run before"
    kept = load_file(tmp_path / "run/best/model.safetensors")
    assert all(torch.equal(kept[name], weights[name]) for name in weights)


@pytest.mark.parametrize("kind", ["OneCycleLR", pytest.param("InverseSqrt", marks=pytest.mark.slow)])
def test_schedules_of_torch_and_of_no_length_are_continued_for_longer(pairs: Path, tmp_path: Path, kind: str) -> None:
    expected: list[float] = []
    for epochs, lr in ((1, 1e-4), (2, 5e-5)):
        params: dict[str, Any] = {"warmup": 4}
        if kind == "OneCycleLR":
            params = {"max_lr": 50 * lr, "div_factor": 50, "cycle_momentum": False, "total_steps": AN_EPOCH * epochs}
        section = {
            "optimizer": {"type": "AdamWScale", "params": {"lr": lr}}, "scheduler": {"type": kind, "params": params}
        }  # fmt: skip
        run(config_of(tmp_path, pairs, section, epochs=epochs, eval_every=9), tmp_path)
        rates = learning_rates(Scheduler(**section["scheduler"]), lr, AN_EPOCH * epochs, list(range(AN_EPOCH * epochs)))
        expected += list(rates.values())[len(expected) :]
    assert [row["lr"] for row in rows(tmp_path, "train")] == pytest.approx(expected, rel=1e-9)


def test_where_nothing_is_to_be_kept_none_is_begun(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_of(tmp_path, pairs)
    words = ["--config", str(tmp_path / "config.json"), "--output-dir", str(tmp_path / "run"), "--is_keep_training"]
    assert launch(words) == 2
    assert "run: there is no checkpoint in it" in capsys.readouterr().err
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("metric", ["loss", "chrf"])
def test_how_texts_are_generated_may_change(
    pairs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], metric: str
) -> None:
    config_of(tmp_path, pairs, eval_every=9, best={"metric": metric})
    train(tmp_path, "--set", "model.generation.samples=4")
    assert rows(tmp_path, "val")[-1]["generated"] == 4
    changed = ["--set", "model.generation.samples=3", "--set", "model.generation.bleu_tokenizer=zh"]
    train(tmp_path, "--is_keep_training", "--epochs=2", *changed)
    assert rows(tmp_path, "val")[-1]["generated"] == 3
    said = "the best weights so far were judged with model.generation " in capfd.readouterr().out
    assert said is (metric == "chrf"), "losses are of the same samples as before"
