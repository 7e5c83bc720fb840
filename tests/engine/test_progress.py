"""What each line of metrics.jsonl says of where the run was, and the evaluation before the first step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.engine.test_trainer import lines, losses, train
from tests.engine.tiny import Net, tiny_config
from trunkline.engine.data.order import FILLER, GlobalBatches
from trunkline.engine.data.randomness import seed_torch
from trunkline.engine.progress import UNCOUNTED
from trunkline.engine.record.history import read_history
from trunkline.engine.record.metrics_file import read_metrics


def test_lines_tell_time_epoch_samples_and_units_without_fillers(tmp_path: Path) -> None:
    """37 samples by 8: the last batch of an epoch has five, and samples differ in points. The weight is points."""
    begin = time.time()
    config = tiny_config(tmp_path, data={"samples": 37}, training={"steps": 12, "log_every": 2})
    trainer = train(tmp_path / "run", config)
    batches, rows = GlobalBatches(37, 8, config.training.seed), trainer.task.dataset("train")
    chosen = [[index for index in batches.samples(step) if index != FILLER] for step in range(12)]
    for row in read_metrics(tmp_path / "run/metrics.jsonl"):
        seen = [index for step in chosen[: row["step"]] for index in step]
        assert (row["samples_seen"], row["points_seen"]) == (len(seen), sum(len(rows[index][0]) for index in seen))
        assert row["epoch"] == row["step"] / 5
        assert begin - 1 < row["time"] < time.time() + 1
    trained = [row for row in read_metrics(tmp_path / "run/metrics.jsonl") if row["split"] == "train"]
    assert [row["samples_seen"] for row in trained] == [16, 32, 45, 61, 74, 90]
    passed = 0.0
    for row, before in zip(trained, [0, 16, 32, 45, 61, 74], strict=True):
        taken, passed = row["seconds"] - passed, row["seconds"]
        assert 2 * row["step_time_s"] == pytest.approx(taken, abs=0.002)
        assert row["samples_per_s"] * 2 * row["step_time_s"] == pytest.approx(row["samples_seen"] - before)


def test_a_run_of_an_earlier_version_resumes_without_what_it_did_not_count(tmp_path: Path) -> None:
    constant = {"scheduler": {"type": "Constant", "params": {}}}
    whole = train(tmp_path / "whole", tiny_config(tmp_path, training={"steps": 6}, deepspeed=constant))
    trainer = train(tmp_path / "old", tiny_config(tmp_path, training={"steps": 4}, deepspeed=constant))
    vars(trainer.progress).update(UNCOUNTED)  # as its checkpoint says it
    trainer.save(in_background=False)
    longer = tiny_config(tmp_path, training={"steps": 6}, deepspeed=constant)
    train(tmp_path / "longer", longer, resume=str(tmp_path / "old"))
    assert losses(tmp_path / "longer") == losses(tmp_path / "whole")[4:]
    assert [row["epoch"] for row in lines(tmp_path / "longer")] == [1.0, 1.2]
    rows = read_metrics(tmp_path / "longer/metrics.jsonl")
    assert not any(key in row for row in rows for key in ("samples_seen", "points_seen", "seconds"))
    assert whole.progress.samples_seen == 48


def test_a_resume_that_leaves_the_schedule_says_both_rates_and_one_that_follows_it_none(tmp_path: Path) -> None:
    short = {"steps": 4, "save_every": 2, "keep_last": 9}
    train(tmp_path / "run", tiny_config(tmp_path, training=short))
    step_2, config = tmp_path / "run/checkpoints/step-00000002", tiny_config(tmp_path, training=short)
    train(tmp_path / "same", config, resume=str(step_2))
    (row,) = lines(tmp_path / "same", "resumed")
    assert row.keys() == {"step", "split", "epoch", "points_seen", "samples_seen", "from", "to"}
    train(tmp_path / "longer", tiny_config(tmp_path, training={"steps": 8}), resume=str(step_2))
    (row,) = lines(tmp_path / "longer", "resumed")
    assert row["lr_before"] == lines(tmp_path / "run")[2]["lr"]
    assert row["lr_after"] == lines(tmp_path / "longer")[0]["lr"] != row["lr_before"]


def test_a_run_that_is_lengthened_during_its_warm_up_follows_another_schedule_at_the_same_rate(tmp_path: Path) -> None:
    warming = {"scheduler": {"type": "WarmupCosine", "params": {"warmup": 4}}}
    config = tiny_config(tmp_path, training={"steps": 6, "save_every": 2, "keep_last": 9}, deepspeed=warming)
    train(tmp_path / "run", config)
    longer = tiny_config(tmp_path, training={"steps": 8}, deepspeed=warming)
    run = train(tmp_path / "longer", longer, resume=str(tmp_path / "run/checkpoints/step-00000002"))
    assert any(note.startswith("note: a new schedule holds from step 2 on") for note in run.assembly.notes)
    (row,) = lines(tmp_path / "longer", "resumed")
    assert row["lr_before"] == row["lr_after"] == lines(tmp_path / "run")[2]["lr"]
    (resume,) = read_history(tmp_path / "longer").resumes
    assert resume.rates == (row["lr_before"], row["lr_after"])


EVERY = {"steps": 4, "eval_every": 2, "save_every": 2}


def test_evaluation_at_the_start_is_of_the_initial_weights_and_changes_nothing_else(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, training=EVERY)
    train(tmp_path / "without", config)
    train(tmp_path / "with", tiny_config(tmp_path, training=EVERY | {"eval_at_start": True}))
    first, *rest = lines(tmp_path / "with", "val")
    assert (first["step"], first["samples_seen"], first["epoch"]) == (0, 0, 0.0)
    assert rest == lines(tmp_path / "without", "val")
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    task = train(tmp_path / "one", tiny_config(tmp_path, training={"steps": 1})).task
    seed_torch(config.training.seed, 0)
    model = Net(config.data.width, config.model)
    rows = [task.dataset("val")[index] for index in range(11)]
    errors = sum((model(x) - y).square().sum().item() for x, y in rows)
    assert first["loss"] == pytest.approx(errors / sum(len(x) for x, _ in rows), rel=1e-5)


def worsening(folder: Path, **training: Any) -> Any:
    """A rate far too high: nothing is better than the weights that training starts from."""
    return tiny_config(
        folder,
        training={"steps": 6, "eval_every": 1, "save_every": 2, "eval_at_start": True} | training,
        deepspeed={
            "optimizer": {"type": "SGD", "params": {"lr": 30.0}},
            "scheduler": {"type": "Constant", "params": {}},
        },
    )


def test_the_initial_weights_can_be_the_best_ones_and_are_what_early_stopping_counts_from(tmp_path: Path) -> None:
    config = worsening(tmp_path, early_stopping={"patience": 2}, keep_best=True, keep_last=1)
    trainer = train(tmp_path / "run", config)
    assert (trainer.progress.step, trainer.progress.best_step) == (2, 0)
    assert [row["step"] for row in lines(tmp_path / "run", "val")] == [0, 1, 2]
    seed_torch(config.training.seed, 0)
    model = Net(config.data.width, config.model)
    best = load_file(tmp_path / "run/best/model.safetensors")
    assert all(best[name].equal(value) for name, value in model.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*")) == [
        "step-00000000", "step-00000002"
    ]  # fmt: skip


def test_a_resumed_run_is_not_evaluated_at_its_start_again(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", worsening(tmp_path))
    train(tmp_path / "run", worsening(tmp_path, steps=3))
    resumed = train(tmp_path / "run", worsening(tmp_path), resume="auto")
    assert lines(tmp_path / "run", "val") == lines(tmp_path / "whole", "val")
    assert resumed.progress == whole.progress
    # and from the checkpoint of step 0 neither
    train(tmp_path / "kept", worsening(tmp_path, steps=1, keep_best=True))
    again = train(tmp_path / "again", worsening(tmp_path), resume=str(tmp_path / "kept/checkpoints/step-00000000"))
    assert [row["step"] for row in lines(tmp_path / "again", "val")] == [1, 2, 3, 4, 5, 6]
    assert again.progress.best_step == 0
    assert (tmp_path / "again/best/model.safetensors").read_bytes() == (
        tmp_path / "whole/best/model.safetensors"
    ).read_bytes()
