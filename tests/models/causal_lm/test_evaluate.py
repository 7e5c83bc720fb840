"""Evaluation beside what training started from, against sums made by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.causal_lm.toy_language import toy_config
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.launchers.evaluate import main
from trunkline.models.causal_lm.evaluate import FREQUENCIES, START, TRAINED, Held, compare, frequencies
from trunkline.models.causal_lm.prepare import prepare
from trunkline.models.registry import make_task

CPU = torch.device("cpu")


def tuned(stores: Path, pretrained: Path, folder: Path, kind: str, **model: Any) -> Path:
    model = {"path": str(pretrained / "best")} | model
    config = toy_config(folder, stores, kind, model=model, training={"steps": 12, "eval_every": 6})
    Trainer(make_task(config), config, start(), folder / "run").run()
    return folder / "run"


def last_validation(run: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == "val"][-1]


def test_a_pretrained_model_is_compared_with_the_frequencies_of_tokens(stores: Path, pretrained: Path) -> None:
    found = compare(pretrained, CPU, batch_size=3)
    expected = last_validation(pretrained)
    assert found.metrics[TRAINED]["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found.metrics[TRAINED]["perplexity"] == pytest.approx(np.exp(expected["loss"]), rel=1e-5)
    assert found.metrics.keys() == {TRAINED, FREQUENCIES}
    assert np.isfinite(found.positions[TRAINED][:40]).all()
    assert np.isnan(found.positions[TRAINED][-1]), "the last token of a sample predicts nothing"


@pytest.mark.parametrize("max_samples", [None, 3])
def test_frequencies_are_counts_plus_one(stores: Path, tmp_path: Path, max_samples: int | None) -> None:
    task: Any = make_task(toy_config(tmp_path, stores))
    train, val = task.store.split("train"), task.dataset("val")
    size = task.store.vocab_size
    counts = np.bincount(np.concatenate([train.tokens(i) for i in range(len(train))]), minlength=size) + 1
    places = range(len(val)) if max_samples is None else [len(val) * i // max_samples for i in range(max_samples)]
    expected = -np.log(counts / counts.sum())[np.concatenate([val[i].tokens[1:] for i in places])].mean()
    held = Held(task, "val", CPU, 2, max_samples, progress=False)
    assert frequencies(held)["loss"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("flag", "value"), [("--batch-size", "0"), ("--max-samples", "0")])
def test_numbers_out_of_range_are_named(
    pretrained: Path, flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run", str(pretrained), flag, value]) == 2
    assert f"{flag} 0: use 1 or more" in capsys.readouterr().err


def test_fine_tuning_is_compared_with_its_start(
    stores: Path, pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrained = shutil.copytree(pretrained, tmp_path / "pretrained")
    stores = shutil.copytree(stores, tmp_path / "stores")
    run = tuned(stores, pretrained, tmp_path, "sft")
    assert main(["--run", str(run), "--out", str(tmp_path / "out")]) == 0
    metrics = json.loads((tmp_path / "out/evaluation.json").read_text())["metrics"]
    assert metrics[TRAINED]["loss"] == pytest.approx(last_validation(run)["loss"], rel=1e-5)
    assert metrics[TRAINED]["loss"] < metrics[START]["loss"]
    assert (tmp_path / "out/evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert f"| {START} |" in capsys.readouterr().out
    task: Any = make_task(toy_config(tmp_path, stores, "sft", model={"path": str(pretrained / "best")}))
    network = task.build_model()
    batch = task.collate([task.dataset("val")[place] for place in range(len(task.dataset("val")))])
    batch["valid"] = torch.ones(len(batch["input_ids"]), dtype=torch.bool)
    loss = float(task.loss(network, batch)["loss"].detach()) / int(task.weight(batch))
    assert metrics[START]["loss"] == pytest.approx(loss, rel=1e-5)

    shutil.rmtree(pretrained)
    assert main(["--run", str(run), "--out", str(tmp_path / "alone")]) == 0
    alone = json.loads((tmp_path / "alone/evaluation.json").read_text())["metrics"]
    assert alone == {TRAINED: pytest.approx(metrics[TRAINED])}
    said = "".join(capsys.readouterr())
    assert f"model.path: {pretrained / 'best'} is not there any more" in said
    assert "has changed" not in said

    store = stores / "conversations"
    shutil.rmtree(store)
    records = (stores / "conversations.jsonl").read_text().splitlines(keepends=True)
    (stores / "fewer.jsonl").write_text("".join(records[:60]))
    prepare(
        [stores / "fewer.jsonl"], store, kind="conversations", val_fraction=0.2, workers=1,
        tokenizer=stores / "text/tokenizer",
    )  # fmt: skip
    assert main(["--run", str(run), "--out", str(tmp_path / "anew")]) == 0
    assert f"warning: {store} has changed since {run / 'best'} was trained" in capsys.readouterr().out


@pytest.mark.parametrize("length_average", [False, True])
def test_preferences_are_compared_pair_by_pair(
    stores: Path, pretrained: Path, tmp_path: Path, length_average: bool
) -> None:
    run = tuned(
        stores, pretrained, tmp_path, "dpo",
        objective={"type": "dpo", "beta": 0.5, "length_average": length_average},
    )  # fmt: skip
    found = compare(run, CPU, batch_size=3)
    expected = last_validation(run)
    for name in ("loss", "rewards/margins", "rewards/accuracies", "prefers_chosen"):
        assert found.metrics[TRAINED][name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    assert found.metrics[START]["prefers_chosen"] == pytest.approx(expected["reference_prefers_chosen"])
    if not length_average:
        assert 0.5 * found.margins.mean() == pytest.approx(expected["rewards/margins"], rel=1e-3, abs=1e-5)
        assert (found.margins > 0).mean() == pytest.approx(expected["rewards/accuracies"])
    assert main(["--run", str(run), "--max-samples", "4"]) == 0
    assert json.loads((run / "evaluation/evaluation.json").read_text())["samples"] == 4
