"""A step is the same however its images are split, and a run however it is broken off: the recipe, and what learns."""

from __future__ import annotations

import contextlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed import run_distributed_test
from tests.models.killed import unbroken_and_killed
from tests.models.token_image.runs import SMALL, run_config
from tests.models.token_image.test_task import LEARNABLE
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.models.token_image.config import TokenImageData, TokenImageModel
from trunkline.models.token_image.task import TokenImageTask

FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "recipe": ({}, SMALL),
    "learnable": ({"encoding": "bits", "stride": 64}, LEARNABLE),
}
"""By name: the sections `data` and `model`."""
MIDDLE = "checkpoints/step-00000003"
EMA = {"decay": 0.5, "warmup": False}
BUFFERS = ("log_frequencies", "curve")


class Layout(NamedTuple):
    """precision: "bf16", "fp16" or "" """

    backend: str = "deepspeed"
    stage: int = 0
    micro: int = 4
    precision: str = ""


class Case(NamedTuple):
    """A run in `folder`, from `resume`."""

    form: str
    config: RunConfig
    folder: Path
    backend: str
    resume: str


def case(form: str, layout: Layout, store: Path, folder: Path, resume: str | Path = "none") -> Case:
    data, model = FORMS[form]
    section: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": layout.micro,
        "zero_optimization": {"stage": layout.stage},
        # so that what is rounded differently in a gradient near 0 is no other step
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-5, "weight_decay": 0.01}},
    }
    if layout.precision:
        section[layout.precision] = {"enabled": True}
    training = {"ema": EMA, "keep_best": True}
    config = run_config(folder / "asked", store, data=data, model=model, training=training, deepspeed=section)
    return Case(form, config, folder, layout.backend, str(resume))


def train(rank: int, world_size: int, cases: list[Case]) -> None:
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        for form, config, folder, backend, resume in cases:
            task = task_of(form, config.data.store)
            Trainer(task, config, start(), folder, backend=backend, resume=resume).run()


@cache
def task_of(form: str, store: str) -> TokenImageTask:
    """One for all runs of a process, since the table of a schedule by information takes seconds."""
    data, model = FORMS[form]
    return TokenImageTask(TokenImageData(store=store, img_size=16, **data), TokenImageModel(**model))


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder) if row["split"] in ("train", "val")]


def weights(folder: Path, which: str = "final") -> dict[str, Tensor]:
    return load_file(folder / which / "model.safetensors")


@pytest.fixture(scope="module")
def whole(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By form, the run of one rank in whole batches."""
    folder = tmp_path_factory.mktemp("whole")
    train(0, 1, [case(form, Layout(), texts, folder / form) for form in FORMS])
    return {form: folder / form for form in FORMS}


def same(folder: Path, other: Path, resumed: bool = False) -> None:
    """Assert the losses and the weights' average of another run, up to rounding; of its second half if resumed."""
    mine, theirs = weights(folder), weights(other)
    expected = losses(other)[len(losses(other)) // 2 :] if resumed else losses(other)
    assert losses(folder) == pytest.approx(expected, rel=1e-6), folder
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-5, atol=1e-6, msg=f"{folder}: {name}")


@pytest.mark.parametrize("form", FORMS)
def test_accumulation_changes_nothing(texts: Path, whole: dict[str, Path], tmp_path: Path, form: str) -> None:
    train(0, 1, [case(form, Layout(micro=micro), texts, tmp_path / f"{micro}") for micro in (1, 2)])
    for micro in (1, 2):
        same(tmp_path / f"{micro}", whole[form])


@pytest.mark.parametrize("form", FORMS)
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(
    texts: Path, whole: dict[str, Path], tmp_path: Path, form: str
) -> None:
    """Times and noise are named by the samples' draws. Step, best and the weights' average come along."""
    train(0, 1, [case(form, Layout(), texts, tmp_path / "after", whole[form] / MIDDLE)])
    then = [row["step"] for row in rows(tmp_path / "after") if row["split"] == "train"]
    assert then == [4, 5, 6]
    half = len(losses(whole[form])) // 2
    assert losses(tmp_path / "after") == losses(whole[form])[half:]
    for which in ("final", "best"):
        one, two = weights(whole[form], which), weights(tmp_path / "after", which)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
    end = "checkpoints/step-00000006/trainer.json"
    one, two = (json.loads((folder / end).read_text()) for folder in (whole[form], tmp_path / "after"))
    for key in ("step", "best", "best_step", "averaged", "skipped_steps"):
        assert one[key] == two[key], key


SOME = {"recipe": [("deepspeed", 3)], "learnable": [("fsdp", 3)]}
EVERY = {form: [(backend, stage) for backend in ("deepspeed", "fsdp") for stage in range(4)] for form in FORMS}


@pytest.mark.distributed
@pytest.mark.parametrize("layouts", [SOME, pytest.param(EVERY, marks=pytest.mark.slow)], ids=["some", "every"])
def test_two_ranks_train_as_one_and_resume_another_layout(
    texts: Path, whole: dict[str, Path], tmp_path: Path, layouts: dict[str, list[tuple[str, int]]]
) -> None:
    """Each layout hands a checkpoint to the next one, and to one rank."""
    first, second, alone = [], [], []
    for form, tried in layouts.items():
        for place, (backend, stage) in enumerate(tried):
            folder = tmp_path / f"{form}-{backend}-{stage}"
            first.append(case(form, Layout(backend, stage, micro=1), texts, folder / "run"))
            other = Layout(*(tried[(place + 1) % len(tried)] if tried[1:] else ("fsdp", 1)), micro=2)
            second.append(case(form, other, texts, folder / "after", folder / "run" / MIDDLE))
            alone.append(case(form, Layout(), texts, folder / "alone", folder / "run" / MIDDLE))
    run_distributed_test(train, 2, [*first, *second], backend=None, timeout_s=600)
    train(0, 1, alone)
    for run in (*first, *second, *alone):
        same(run.folder, whole[run.form], resumed=run.resume != "none")


LOW = [Layout("deepspeed", 1, 4, "bf16"), Layout("fsdp", 2, 4, "fp16")]


@pytest.mark.parametrize("layout", LOW, ids=lambda layout: f"{layout.backend}-{layout.precision}")
def test_in_low_precision_a_resumed_run_is_the_unbroken_one_and_tables_keep_theirs(
    texts: Path, whole: dict[str, Path], tmp_path: Path, layout: Layout
) -> None:
    """The gradient's scale comes along. Tables of tokens are in every folder of weights as they were made, in fp32."""
    unbroken, after = tmp_path / "unbroken", tmp_path / "after"
    runs = [case("learnable", layout, texts, unbroken), case("learnable", layout, texts, after, unbroken / MIDDLE)]
    train(0, 1, runs)
    assert losses(after) == losses(unbroken)[len(losses(unbroken)) // 2 :]
    assert losses(unbroken) == pytest.approx(losses(whole["learnable"]), rel=0.05)
    end = "checkpoints/step-00000006/trainer.json"
    one, two = (json.loads((folder / end).read_text())["loss_scaler"] for folder in (unbroken, after))
    assert one == two
    assert bool(one) is (layout.precision == "fp16")
    expected = task_of("learnable", str(texts)).build_model().state_dict()
    for folder in (unbroken / "final", unbroken / "best", after / "final"):
        held = load_file(folder / "model.safetensors")
        for name in BUFFERS:
            assert held[name].dtype == torch.float32
            assert torch.equal(held[name], expected[name]), f"{folder}: {name}"
    assert expected["curve"].any()


@pytest.mark.slow
@pytest.mark.fault("kill -9 of a run of token_image: the recipe, and what learns")
@pytest.mark.parametrize("form", FORMS)
def test_a_killed_run_ends_as_an_unbroken_one_bit_for_bit(texts: Path, tmp_path: Path, form: str) -> None:
    case(form, Layout(micro=2), texts, tmp_path)
    config, settings = str(tmp_path / "asked/config.json"), ["--steps", "40", "--set", "training.save_every=2"]
    unbroken, broken = unbroken_and_killed(["--config", config, *settings, "--resume", "auto"], tmp_path)
    assert losses(broken) == losses(unbroken)
    one, two = weights(unbroken), weights(broken)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
