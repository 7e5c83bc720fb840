"""Another program's checkpoint: what a task writes at each new best, and starts from, on every layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import run_distributed_test
from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.checkpoint.checkpoints import Checkpoints
from trunkline.engine.checkpoint.other_programs import start_from
from trunkline.engine.checkpoint.weights import WEIGHTS
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.data.order import GlobalBatches
from trunkline.engine.errors import CheckpointError, ConfigError
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.engine.whole_state import WholeState

LAYOUTS = [("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3), ("fsdp", 3)]


class Exchanging(TinyTask):
    """Its other program's file is what torch saves of a WholeState."""

    def write_best(self, folder: Path, state: Callable[[], WholeState]) -> None:
        torch.save(asdict(found := state()), folder / f"other-{found.step}.pt")

    def read_state(self, path: Path, steps_per_epoch: int) -> WholeState:
        return replace(WholeState(**torch.load(path)), steps_per_epoch=steps_per_epoch)


def configuration(folder: Path, stage: int = 0, other: Path | None = None, **training: Any) -> RunConfig:
    settings = {"start_from": None if other is None else str(other), "keep_best": True, "keep_last": 1} | training
    return tiny_config(folder, training=settings, deepspeed={"zero_optimization": {"stage": stage}})


def train(folder: Path, config: RunConfig, backend: str = "deepspeed", task: type[TinyTask] = Exchanging) -> Trainer:
    trainer = Trainer(task(config.data, config.model), config, start(), folder, backend=backend, resume="auto")
    trainer.run()
    return trainer


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first evaluation, which is a new best, is after step 5; saves are due after 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("unbroken")
    train(folder, configuration(folder))
    return folder


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name} {text}"
        )


def assert_continues(folder: Path, unbroken: Path, layouts: list[tuple[str, int]]) -> None:
    for backend, stage in layouts:
        run = folder / f"{backend}-{stage}"
        assert_same(load_file(run / "final" / WEIGHTS), load_file(unbroken / "final" / WEIGHTS))


def continue_on_a_rank(rank: int, world_size: int, folder: Path, other: Path) -> None:
    for backend, stage in LAYOUTS:
        config = configuration(folder / f"{rank}-{backend}-{stage}", stage, other)
        train(folder / f"{backend}-{stage}", config, backend)


@pytest.mark.parametrize(("backend", "stage"), [("deepspeed", 0), ("deepspeed", 2), ("fsdp", 3)])
def test_a_run_from_such_a_file_is_the_unbroken_run(tmp_path: Path, unbroken: Path, backend: str, stage: int) -> None:
    config = configuration(tmp_path, stage, unbroken / "other-5.pt")
    train(tmp_path / f"{backend}-{stage}", config, backend)
    assert_continues(tmp_path, unbroken, [(backend, stage)])
    rows = [json.loads(line) for line in (tmp_path / f"{backend}-{stage}/metrics.jsonl").read_text().splitlines()]
    assert min(row["step"] for row in rows) == 6


@pytest.mark.slow
@pytest.mark.distributed
def test_so_is_it_on_two_ranks_and_what_they_write_is_the_same(tmp_path: Path, unbroken: Path) -> None:
    run_distributed_test(continue_on_a_rank, 2, tmp_path, unbroken / "other-5.pt", backend=None)
    assert_continues(tmp_path, unbroken, LAYOUTS)
    ours = torch.load(unbroken / "other-10.pt")
    for backend, stage in LAYOUTS:
        theirs = torch.load(tmp_path / f"{backend}-{stage}" / "other-10.pt")
        for part in ("parameters", "buffers"):
            assert list(theirs[part]) == list(ours[part])
            assert_same(theirs[part], ours[part])
        for name, kept in ours["kept"].items():
            assert_same(theirs["kept"][name], kept)
        assert (theirs["step"], theirs["optimizer"]) == (10, ours["optimizer"])


def test_what_is_written_is_the_state_of_the_step_that_was_best(unbroken: Path) -> None:
    held = torch.load(unbroken / "other-5.pt")
    assert (held["step"], held["steps_per_epoch"]) == (5, 5)
    rows = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    at_5 = {row["split"]: row for row in rows if row["step"] == 5}
    assert held["metrics"]["loss"] == at_5["val"]["loss"]
    assert held["optimizer"]["lr"] == at_5["train"]["lr"]
    assert {float(kept["step"]) for kept in held["kept"].values()} == {5.0}
    model = TinyTask(configuration(unbroken).data, configuration(unbroken).model).build_model()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.load_state_dict({"state": dict(enumerate(held["kept"].values())), "param_groups": [
        {**held["optimizer"], "params": list(range(len(held["kept"])))}]})  # fmt: skip
    model.load_state_dict({**held["parameters"], **held["buffers"]})


def test_keep_best_saves_at_each_new_best(unbroken: Path) -> None:
    steps = sorted(int(path.name.removeprefix("step-")) for path in (unbroken / "checkpoints").glob("step-*"))
    best = json.loads((unbroken / "checkpoints/step-00000012/trainer.json").read_text())["best_step"]
    assert steps == sorted({best, 12})
    assert sorted(path.name for path in unbroken.glob("other-*"))[:2] == ["other-10.pt", "other-12.pt"]


def test_a_checkpoint_of_the_runs_own_comes_first(
    tmp_path: Path, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = unbroken / "other-5.pt"
    train(tmp_path / "run", configuration(tmp_path, other=other, steps=8))
    trainer = train(tmp_path / "run", configuration(tmp_path, other=other))
    assert trainer.assembly.first_step == 8
    assert (
        f"note: {tmp_path}/run/checkpoints/step-00000008 is resumed from, so {other} is left out"
        in capsys.readouterr().out
    )


def test_an_optimizer_that_keeps_something_else_begins_anew(
    tmp_path: Path, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": 0.01, "momentum": 0.9}}}
    config = tiny_config(tmp_path, training={"start_from": str(unbroken / "other-5.pt"), "steps": 6}, deepspeed=sgd)
    trainer = train(tmp_path / "run", config)
    said = "its optimizer keeps exp_avg, exp_avg_sq, step, and SGD keeps momentum_buffer: that is left out"
    assert said in capsys.readouterr().out
    assert trainer.progress.step == 6


def test_a_file_of_the_last_step_trains_nothing_and_says_so(
    tmp_path: Path, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = unbroken / "other-5.pt"
    train(tmp_path / "run", configuration(tmp_path, other=other, steps=5))
    said = "is at step 5, this run's last, so nothing is trained: ask for more than 1 epochs, or 5 steps"
    assert f"note: {other}: {said}" in capsys.readouterr().out


def test_what_an_optimizer_of_deepspeeds_own_keeps_is_not_known(
    tmp_path: Path, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lion = {"optimizer": {"type": "Lion", "params": {"lr": 0.01}}}
    config = tiny_config(tmp_path, training={"start_from": str(unbroken / "other-5.pt"), "steps": 6}, deepspeed=lion)
    folder, ranks = tmp_path / "run/checkpoints", start()
    checkpoints = Checkpoints(folder, ranks, keep_last=1)
    checkpoints.open_for_writing()
    other, task, batches = unbroken / "other-5.pt", Exchanging(config.data, config.model), GlobalBatches(40, 8, 0)
    _, notes = start_from(str(other), None, task, config, checkpoints, {}, 6, batches)
    assert notes[1:] == [
        f"note: {other}: its optimizer keeps exp_avg, exp_avg_sq, step, and Lion keeps what only DeepSpeed knows: "
        "that is left out"
    ]


def test_the_best_value_is_taken_over_and_best_weights_with_it(tmp_path: Path, unbroken: Path) -> None:
    class SeesNothingBetter(Exchanging):
        def summarize(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
            return {"loss": 1e6}

    trainer = train(tmp_path / "run", configuration(tmp_path, other=unbroken / "other-5.pt"), task=SeesNothingBetter)
    held = torch.load(unbroken / "other-5.pt")
    assert (trainer.progress.best, trainer.progress.best_step) == (held["metrics"]["loss"], 5)
    assert_same(load_file(tmp_path / "run/best" / WEIGHTS), {**held["parameters"], **held["buffers"]})
    assert not list((tmp_path / "run").glob("other-*"))


class Refusing(Exchanging):
    def write_best(self, folder: Path, state: Callable[[], WholeState]) -> None:
        raise OSError(28, "No space left on device", str(folder / "other.pt"))


def test_a_file_that_cannot_be_written_ends_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", configuration(tmp_path), task=Refusing).progress.step == 12
    said = capsys.readouterr().out
    assert "warning: step 5: the task could not write the new best (OSError: [Errno 28] No space left" in said
    assert "it is tried again when the run is resumed" in said


@pytest.mark.parametrize(
    ("kind", "training", "error", "message"),
    [
        (TinyTask, {}, ConfigError, "training.start_from: .*other-5.pt: this workload reads no checkpoints"),
        (
            Exchanging,
            {"steps": 4},
            CheckpointError,
            "other-5.pt: is at step 5, past this run's last step 4: ask for more than 1 epochs, or 5 steps",
        ),
        (Exchanging, {"start_from": ""}, ConfigError, "training.start_from: .*give the path"),
    ],
)
def test_what_cannot_be_taken_up_is_an_error(
    tmp_path: Path, unbroken: Path, kind: type[TinyTask], training: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(tmp_path / "run", configuration(tmp_path, other=unbroken / "other-5.pt", **training), task=kind)
