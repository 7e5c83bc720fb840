"""best/ holds the best weights of the run as it stands, or is not there, and the last line of a run says which."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.checkpoint.best import BestWeights, outcome
from trunkline.engine.checkpoint.digests import check_digests
from trunkline.engine.checkpoint.export import export_weights
from trunkline.engine.checkpoint.manifest import verify
from trunkline.engine.checkpoint.weights import find_weights, saved_facts
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.errors import ConfigError
from trunkline.engine.ranks.distributed import start
from trunkline.engine.record.history import read_history
from trunkline.engine.task import Sums
from trunkline.engine.trainer import Trainer

FAST = {"optimizer": {"type": "SGD", "params": {"lr": 0.02}}, "scheduler": {"type": "Constant", "params": {}}}


class Scored(TinyTask):
    """Measures the loss upside down too, says so, and may measure nothing that is a number."""

    broken = False

    def summarize(self, sums: Sums) -> dict[str, float]:
        found = super().summarize(sums)
        return found | {"loss": math.nan if self.broken else found["loss"], "score/part": -found["loss"]}

    def direction(self, metric: str) -> Literal["min", "max"] | None:
        return "max" if metric.split("/")[0] == "score" else None


class Broken(Scored):
    broken = True


class Worsening(Scored):
    """Each evaluation is worse than the one before."""

    evaluations = 0

    def summarize(self, sums: Sums) -> dict[str, float]:
        self.evaluations += 1
        found = super().summarize(sums)
        return found | {"loss": found["loss"] + 1e6 * self.evaluations}


def config_of(folder: Path, deepspeed: dict[str, Any] = FAST, **training: Any) -> RunConfig:
    defaults = {"steps": 8, "eval_every": 2, "save_every": 2, "keep_last": 9}
    return tiny_config(folder, training=defaults | training, deepspeed=deepspeed)


def prepared(folder: Path, config: RunConfig, resume: str = "none", task: type[Scored] = Scored) -> Trainer:
    return Trainer(task(config.data, config.model), config, start(), folder, resume=resume)


def train(folder: Path, config: RunConfig, resume: str = "none", task: type[Scored] = Scored) -> Trainer:
    trainer = prepared(folder, config, resume, task)
    trainer.run()
    return trainer


def said(trainer: Trainer) -> str:
    best = trainer.config.training.best
    return outcome(trainer.folder, best, trainer.progress, "report/summary.md")


def weights_of(checkpoint: Path, out: Path) -> dict[str, torch.Tensor]:
    export_weights(verify(checkpoint), out, 1 << 40)
    return load_file(out / "model.safetensors")


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_direction_is_the_tasks_and_recorded(tmp_path: Path) -> None:
    trainer = train(tmp_path / "run", config_of(tmp_path, best={"metric": "score/part"}))
    for file in ("config.json", "best/config.json", "assets/config.json"):
        recorded = json.loads((tmp_path / "run" / file).read_text())["training"]["best"]
        assert recorded == {"metric": "score/part", "mode": "max"}
    assert trainer.assembly.plan["origins"]["training.best.mode"] == "the metric's direction"
    assert trainer.progress.best_step == 8
    assert saved_facts(tmp_path / "run/best")["step"] == 8


@pytest.mark.parametrize(
    ("best", "message"),
    [
        (
            {"metric": "score", "mode": "min"},
            r"training.best.mode: min would keep the worst .* set it to max, or leave",
        ),
        ({"metric": "score/part", "mode": "min"}, r"since a lower 'score/part' is worse"),
        ({"metric": "loss", "mode": "max"}, r"max would keep the worst weights, since a higher 'loss' is worse"),
        ({"metric": "samples"}, r"training.best.mode: whether a higher or a lower 'samples' .* min or max"),
        ({"metric": "scores/part"}, r"'scores/part' is not measured; did you mean 'score/part'"),
    ],
)
def test_a_direction_that_is_wrong_or_unknown_is_an_error(tmp_path: Path, best: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(tmp_path / "run", config_of(tmp_path, best=best, steps=2))


@pytest.mark.parametrize("best", [{"metric": "score/part"}, {"metric": "samples", "mode": "max"}])
def test_another_metric_is_judged_anew_and_the_old_best_is_set_aside(
    tmp_path: Path, best: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    old = train(run, config_of(tmp_path, steps=4))
    assert old.progress.best is not None
    config = config_of(tmp_path, best=best, steps=6)
    trainer = prepared(run, config, "auto")
    assert (trainer.progress.best, trainer.progress.evaluations_without_gain) == (None, 0)
    assert not (run / "best").exists()
    assert saved_facts(run / "aside-best-step-4")["loss"] == old.progress.best
    printed = capsys.readouterr().out
    assert "judged by loss (min), from now on they are by " + best["metric"] in printed
    assert "renamed to aside-best-step-4" in printed
    trainer.run()
    assert trainer.progress.best_step == 6
    assert saved_facts(run / "best").keys() == {"step", best["metric"]}
    again = prepared(run, config_of(tmp_path, best=best, steps=8), "auto")
    assert again.progress.best == trainer.progress.best
    assert (run / "best").exists()


@pytest.mark.parametrize(
    ("change", "judged"),
    [
        ({"training": {"eval_samples": None}}, "with training.eval_samples 2, and it is 11 now"),
        ({"data": {"samples": 39, "longest": 4}}, "on other data than this run has"),
    ],
)
def test_a_best_that_was_measured_otherwise_is_not_compared(
    tmp_path: Path, change: dict[str, Any], judged: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, short = tmp_path / "run", {"eval_every": 2, "save_every": 2, "eval_samples": 2}
    config = tiny_config(tmp_path, training=short | {"steps": 4})
    Trainer(Scored(config.data, config.model), config, start(), run).run()
    for steps, lines in ((6, 1), (8, 0)):  # what is measured in the new way is not forgotten
        training = short | {"steps": steps} | change.get("training", {})
        config = tiny_config(tmp_path, training=training, data=change.get("data", {}))
        trainer = Trainer(Scored(config.data, config.model), config, start(), run, resume="auto", accept_new_data=True)
        assert capsys.readouterr().out.count(f"were judged {judged}: the next evaluation is the first") == lines
        trainer.run()
        assert trainer.progress.best_step == read_history(run).best_step > 4
    said = f"after step 4 evaluations are measured in another way (just before: {judged})"
    assert read_history(run).measured_before == said
    assert (run / "aside-best-step-4").is_dir()


@pytest.mark.parametrize("kept", [True, False])
def test_after_a_resume_from_an_earlier_step_best_is_of_this_branch(
    tmp_path: Path, kept: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(run, config_of(tmp_path))
    abandoned = load_file(run / "best/model.safetensors")
    assert saved_facts(run / "best")["step"] == 8
    expected = weights_of(run / "checkpoints/step-00000004", tmp_path / "out")
    earlier = run / "checkpoints/step-00000004"
    if not kept:  # the weights of its best step are nowhere
        state = json.loads((earlier / "trainer.json").read_text())
        assert state["best_step"] == 4
        shutil.rmtree(run / "checkpoints/step-00000004")
        earlier = run / "checkpoints/step-00000002"
    trainer = prepared(run, config_of(tmp_path), str(earlier), Worsening)
    assert equal(load_file(run / "aside-best-step-8/model.safetensors"), abandoned)
    assert saved_facts(run / "aside-final-step-8")["step"] == 8
    assert not (run / "final").exists()
    assert saved_facts(run / "best")["step"] == (4 if kept else 2)
    assert kept == equal(load_file(run / "best/model.safetensors"), expected)
    check_digests(run / "best")
    assert {path.name for path in (run / "best").iterdir()} == {
        "config.json", "digests.json", "model.safetensors", "note.txt",
    }  # fmt: skip
    assert "is made from" in capsys.readouterr().out
    trainer.run()
    assert trainer.progress.best_step == (4 if kept else 2)
    assert f"best/ (loss {trainer.progress.best:.6g} at step" in said(trainer)


def test_a_run_that_goes_on_from_another_has_its_best_or_says_that_there_is_none(tmp_path: Path) -> None:
    other = tmp_path / "other"
    train(other, config_of(tmp_path, steps=4))
    old = train(other, config_of(tmp_path, steps=6), "auto", Worsening)
    assert old.progress.best_step == 4
    trainer = train(tmp_path / "new", config_of(tmp_path), str(other), Worsening)
    assert trainer.progress.best_step == 4
    assert equal(load_file(other / "best/model.safetensors"), load_file(tmp_path / "new/best/model.safetensors"))
    assert said(trainer).startswith("best/ (loss")

    shutil.rmtree(other / "best")
    trainer = train(tmp_path / "from-checkpoint", config_of(tmp_path), str(other), Worsening)
    expected = weights_of(other / "checkpoints/step-00000004", tmp_path / "out")
    assert equal(load_file(tmp_path / "from-checkpoint/best/model.safetensors"), expected)

    shutil.rmtree(other / "checkpoints/step-00000004")
    trainer = train(tmp_path / "without", config_of(tmp_path), str(other), Worsening)
    assert not (tmp_path / "without/best").exists()
    assert said(trainer) == (
        f"final/ and report/summary.md; no best/: nothing was better than loss {trainer.progress.best:.6g} at step 4, "
        "whose weights are not here"
    )
    assert find_weights(tmp_path / "without") == tmp_path / "without/final"


def test_a_best_that_is_damaged_is_not_handed_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    train(other, config_of(tmp_path, steps=4))
    weights = other / "best/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    expected = weights_of(other / "checkpoints/step-00000004", tmp_path / "out")
    prepared(tmp_path / "new", config_of(tmp_path), str(other))
    assert equal(load_file(tmp_path / "new/best/model.safetensors"), expected)
    assert "model.safetensors: is not the file that was written" in capsys.readouterr().out


def test_a_run_that_never_measured_a_number_says_that_it_has_no_best(tmp_path: Path) -> None:
    trainer = train(tmp_path / "run", config_of(tmp_path, steps=2), task=Broken)
    assert not (tmp_path / "run/best").exists()
    assert said(trainer) == "final/ and report/summary.md; no best/: no evaluation has measured a finite loss"


def test_a_best_from_before_the_first_checkpoint_is_set_aside_once(tmp_path: Path) -> None:
    """A run that is killed before its first checkpoint starts anew; what it left does not pile up."""
    run = tmp_path / "run"
    for _ in range(3):
        trainer = prepared(run, config_of(tmp_path, save_every=8), "auto")
        assert not (run / "best").exists()
        trainer.validation.evaluate()
        assert (run / "best").exists()
    assert {path.name for path in run.glob("aside-best*")} == {"aside-best-step-0"}


def test_a_best_of_an_earlier_version_is_recognised_by_step_and_value(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = train(run, config_of(tmp_path, steps=4))
    (run / "best/digests.json").unlink()
    progress = replace(trainer.progress, best_weights="")
    best = BestWeights(run, trainer.task, trainer.config, progress)
    assert best.settle(None, start()) == []
    assert (run / "best").exists()
    progress.best_step = 2
    assert "renamed to aside-best-step-4" in best.settle(None, start())[0]


def test_a_misspelt_metric_does_not_cost_a_resumed_run_its_best(tmp_path: Path) -> None:
    run, settings = tmp_path / "run", {"keep_last": 1}
    step = train(run, config_of(tmp_path, steps=4, **settings), task=Worsening).progress.best_step
    assert step == 2  # whose checkpoint is gone
    best = load_file(run / "best/model.safetensors")
    with pytest.raises(ConfigError, match="'los' is not measured"):
        train(run, config_of(tmp_path, best={"metric": "los", "mode": "min"}, **settings), "auto", Worsening)
    assert not (run / "best").exists()
    assert prepared(run, config_of(tmp_path, **settings), "auto", Worsening).progress.best_step == 2
    assert equal(load_file(run / "best/model.safetensors"), best)
