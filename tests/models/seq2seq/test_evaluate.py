"""Evaluation beside what training started from, against what training itself measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.models.seq2seq.test_generated import last_validation, page
from tests.models.seq2seq.toy_pairs import toy_config, toy_store
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.launchers.evaluate import main
from trunkline.models.registry import make_task
from trunkline.models.seq2seq.evaluate import START, TRAINED, compare
from trunkline.models.seq2seq.prepare import prepare

CPU = torch.device("cpu")
SCORES = ("generated", "exact_match", "bleu", "chrf", "token_accuracy")


def test_fine_tuning_is_compared_with_its_start(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = toy_store(tmp_path)
    best = shutil.copytree(trained_run / "best", tmp_path / "best")
    model = {"path": str(best), "generation": {"samples": 3}}
    config = toy_config(tmp_path, pairs, model=model, training={"steps": 4, "eval_every": 4})
    Trainer(make_task(config), config, start(), tmp_path / "run").run()
    out = tmp_path / "out"
    assert main(["--run", str(tmp_path / "run"), "--out", str(out), "--batch-size", "5"]) == 0
    assert f"| {START} |" in capsys.readouterr().out
    found = json.loads((out / "evaluation.json").read_text())
    before, after = last_validation(trained_run), last_validation(tmp_path / "run")
    for name in SCORES:
        assert found["metrics"][START][name] == pytest.approx(before[name], rel=1e-12), name
    assert found["metrics"][TRAINED]["loss"] == pytest.approx(after["loss"], rel=1e-5)
    assert found["metrics"][TRAINED]["generated"] == found["samples"] == before["generated"]
    assert "tok:13a" in found["signatures"]["bleu"]
    assert (out / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert "tok:13a" in (out / "evaluation.md").read_text()
    assert after["generated"] == 3

    shutil.rmtree(best)
    assert main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "alone"), "--batch-size", "5"]) == 0
    alone = json.loads((tmp_path / "alone/evaluation.json").read_text())["metrics"]
    assert alone == {TRAINED: pytest.approx(found["metrics"][TRAINED])}
    said = "".join(capsys.readouterr())
    assert f"model.path: {best} is not there any more" in said
    assert "has changed" not in said

    records = tmp_path / "pairs.jsonl"
    records.write_text("".join(records.read_text().splitlines(keepends=True)[:70]))
    shutil.rmtree(pairs)
    prepare([records], pairs, tokenizer=tmp_path / "run/best", val_fraction=0.2)
    assert main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "alone"), "--generate", "0"]) == 0
    assert f"warning: {pairs} has changed since {tmp_path / 'run/best'} was trained" in capsys.readouterr().out


def test_what_was_trained_from_nothing_is_shown_alone_with_every_text(trained_run: Path, tmp_path: Path) -> None:
    assert main(["--run", str(trained_run), "--out", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]
    assert metrics.keys() == {TRAINED}
    assert metrics[TRAINED] == pytest.approx({name: last_validation(trained_run)[name] for name in metrics[TRAINED]})
    assert (tmp_path / "generated.md").read_text() == page(trained_run)


@pytest.mark.parametrize(("generate", "generated"), [(0, None), (2, 2.0)])
def test_how_many_texts_are_generated_can_be_said(
    trained_run: Path, tmp_path: Path, generate: int, generated: float | None
) -> None:
    flags = ["--run", str(trained_run), "--out", str(tmp_path), "--generate", str(generate)]
    assert main(flags) == 0
    metrics = json.loads((tmp_path / "evaluation.json").read_text())["metrics"][TRAINED]
    assert metrics.get("generated") == generated
    assert metrics["token_accuracy"] == last_validation(trained_run)["token_accuracy"]
    assert (tmp_path / "generated.md").exists() == (generate > 0)


def test_packed_training_data_are_evaluated_pair_by_pair(trained_run: Path, tmp_path: Path) -> None:
    best = Path(shutil.copytree(trained_run / "best", tmp_path / "best"))
    (best / "digests.json").unlink()  # its files are changed
    config = json.loads((best / "config.json").read_text())
    config["data"] |= {"packing": True, "packed_source_length": 128}
    (best / "config.json").write_text(json.dumps(config))
    plain, packed = (compare(run, CPU, split="train", generate=5) for run in (trained_run, best))
    assert packed.metrics == plain.metrics
    assert packed.samples == plain.samples
    assert packed.metrics[TRAINED]["generated"] == 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "0"], "--batch-size 0: use 1 or more"),
        (["--max-samples", "0"], "--max-samples 0: use 1 or more"),
        (["--generate", "-1"], "--generate -1: use 0 or more"),
        (["--split", "test"], "no split 'test'"),
    ],
)
def test_mistakes_are_named(
    trained_run: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run", str(trained_run), *flags]) == 2
    assert message in capsys.readouterr().err
