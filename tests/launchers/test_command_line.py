"""The command line of launchers/train.py, on a workload of another package with thirty flags of its own."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.engine.machine.test_apex import install
from tests.launchers.pictures.flags import DEFAULTS, FLAGS
from trunkline.engine.config.deepspeed_section import BatchSizes, batch_sizes
from trunkline.engine.config.flags import seed
from trunkline.engine.config.run_config import RunConfig, checked
from trunkline.engine.errors import ConfigError
from trunkline.launchers import evaluate, export, predict, train
from trunkline.launchers.command_line import Command, parse
from trunkline.models.registry import config_sections


@pytest.fixture(autouse=True)
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workload "pictures", as a package that is installed adds it."""
    install(tmp_path, "pictures", "1.0", [])
    points = "[trunkline.workloads]\npictures = tests.launchers.pictures\n"
    (tmp_path / "pictures-1.0.dist-info/entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(tmp_path)


def configured(*words: str, world_size: int = 1) -> tuple[Command, RunConfig]:
    command = parse(["pictures", "--data_path", "shots", *words])
    return command, checked(command.draft(world_size), config_sections)


def section(config: RunConfig) -> dict[str, Any]:
    return config.as_dict()["deepspeed"]


def test_a_workload_starts_from_its_defaults() -> None:
    command, config = configured()
    assert (config.training.epochs, config.training.early_stopping.patience) == (100, 100)
    assert config.data.path == str(Path("shots").absolute())
    assert (config.model.arch, config.model.project_name) == ("resnet18", "ai-classifier")
    optimizer = config.deepspeed.optimizer
    assert (optimizer.type, optimizer.params) == ("Adam", {"lr": 0.01, "weight_decay": 0.01})
    assert section(config)["scheduler"]["params"] == {"warmup": 0.03, "min_ratio": 0.1}
    assert (command.arguments.resume, command.arguments.output_dir) == ("auto", None)
    assert config.source == str(DEFAULTS)


@pytest.mark.parametrize(
    ("words", "world_size", "micro", "steps"),
    [
        ([], 1, 256, 1),
        ([], 8, 256, 1),
        (["--batch_size", "32"], 1, 32, 8),
        (["--batch_size", "32"], 4, 32, 2),
        (["--grad_acc", "0", "--batch_size", "48"], 2, 48, 2),  # the order on the command line is of no account
        (["--grad_acc=-1", "--batch_size", "32"], 1, 32, 1),
        (["--grad_acc", "4", "--batch_size", "32"], 2, 32, 4),
        (["--grad-acc", "auto", "--batch-size=100"], 1, 100, 2),
    ],
)
def test_the_global_batch_follows_from_that_of_a_gpu(words: list[str], world_size: int, micro: int, steps: int) -> None:
    found = batch_sizes(configured(*words, world_size=world_size)[1].deepspeed, world_size)
    assert found == BatchSizes(micro * steps * world_size, micro, steps, world_size)


@pytest.mark.parametrize(
    ("words", "epochs", "frozen"),
    [
        (["--is_finetune"], 10, True),
        (["--is-finetune"], 10, True),
        (["--is_finetune=True"], 10, True),
        (["--is_finetune=true"], 10, True),
        (["--is_finetune=1"], 10, True),
        (["--is_finetune", "true"], 10, True),
        (["--is_finetune", "--epochs", "7"], 7, True),
        (["--epochs", "7", "--is_finetune"], 7, True),
        (["--is_finetune=false"], 100, False),
        (["--is_finetune=0"], 100, False),
        (["--is_finetune", "False"], 100, False),
        (["--no-is_finetune"], 100, False),
        (["--no-is-finetune"], 100, False),
        (["--no_is_finetune"], 100, False),
        (["--is_finetune", "--no-is_finetune"], 100, False),
    ],
)
def test_a_flag_that_is_true_or_false_is_taken_as_it_is_meant(words: list[str], epochs: int, frozen: bool) -> None:
    _, config = configured(*words)
    assert (config.model.frozen, config.training.epochs) == (frozen, epochs)
    assert config.deepspeed.scheduler.params["warmup"] == pytest.approx(3 / epochs)


def test_what_is_neither_true_nor_false_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        configured("--is_finetune", "maybe")
    assert "--is_finetune: expected true or false, found 'maybe'" in capsys.readouterr().err


def test_the_length_is_in_epochs_or_in_steps() -> None:
    _, config = configured("--steps", "30", "--set", "deepspeed.scheduler.params.warmup=3")
    assert (config.training.epochs, config.training.steps) == (None, 30)
    assert config.origins["training.steps"] == "--steps"
    with pytest.raises(ConfigError, match="--epochs 2 and --steps 30: give one of them"):
        configured("--steps", "30", "--epochs", "2")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--optimizer", "SGD", "--lr0", "0.1"],
         {"lr": 0.1, "weight_decay": 0.01, "momentum": 0.9, "nesterov": True}),
        (["--optimizer", "AdamW", "--wd", "0.5"], {"lr": 0.01, "weight_decay": 0.5}),
        (["--wd", "0.5", "--set", "deepspeed.optimizer.params.weight_decay=0.25"], {"lr": 0.01, "weight_decay": 0.25}),
    ],
)  # fmt: skip
def test_flags_act_on_one_another_and_a_setting_on_all(words: list[str], found: dict[str, Any]) -> None:
    assert section(configured(*words)[1])["optimizer"]["params"] == found


def test_a_flag_looks_at_the_configuration() -> None:
    params = section(configured("--lr0", "0.1", "--lrf", "0.2", "--min_lr", "0.05", "--warmup_epochs", "5")[1])
    assert params["scheduler"]["params"] == {"warmup": 0.05, "min_ratio": 0.5}
    assert "scheduler" not in section(configured("--scheduler_type", "constant")[1])


@pytest.mark.parametrize(
    ("words", "resume", "folder"),
    [
        ([], "auto", None),
        (["--no-auto-resume"], "none", None),
        (["--auto_resume", "--resume", "none"], "none", None),
        (["--model_path", "models"], "auto", Path("models")),
        (["--model_path", "models", "--output_dir", "other"], "auto", Path("other")),
    ],
)
def test_a_flag_may_stand_for_one_of_the_launcher(words: list[str], resume: str, folder: Path | None) -> None:
    arguments = configured(*words)[0].arguments
    assert (arguments.resume, arguments.output_dir) == (resume, folder)


def test_a_file_to_resume_from_is_another_programs_to_start_from(tmp_path: Path) -> None:
    (tmp_path / "checkpoint_epoch_3.pth").touch()
    for value, start_from, resume in (
        (tmp_path / "checkpoint_epoch_3.pth", str(tmp_path / "checkpoint_epoch_3.pth"), "auto"),
        (tmp_path, None, str(tmp_path)),
        (tmp_path / "nothing.pth", None, str(tmp_path / "nothing.pth")),
    ):
        command, config = configured("--resume", str(value))
        assert (config.training.start_from, command.arguments.resume) == (start_from, resume)


def test_every_other_flag_reaches_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    words = ["--train_size", "90", "--val-size", "9", "--img_size=64", "--arch", "resnet34", "--pretrained",
             "--load_model", "weights", "--early_stopping", "7", "--project_name", "shop", "--task-name", "one",
             "--disable_mlflow", "--skip_mlflow_model_upload", "--device", "0,1", "--no-export_onnx",
             "--distributed"]  # fmt: skip
    _, config = configured(*words, world_size=2)
    assert config.data.model_dump() == {
        "path": str(Path("shots").absolute()), "img_size": 64, "train_size": 90, "val_size": 9}  # fmt: skip
    assert config.model.model_dump() == {
        "arch": "resnet34", "pretrained": True, "load_model": str(Path("weights").absolute()), "frozen": False,
        "export_onnx": False, "project_name": "shop", "task_name": "one", "upload": False}  # fmt: skip
    assert config.training.early_stopping.patience == 7
    assert config.training.trackers == ("tensorboard",)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_a_flag_may_end_or_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        configured("--list-models")
    assert capsys.readouterr().out == "resnet18\nresnet34\nresnet50\n"
    with pytest.raises(ConfigError, match="start with torchrun"):
        configured("--distributed")


def test_with_a_file_only_the_flags_that_are_given_act(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(configured("--lr0", "0.5", "--epochs", "9")[1].as_dict()))
    command = parse(["--batch-size", "8", "--config", str(path)])  # the workload is read from the file first
    config = checked(command.draft(2), config_sections)
    assert (config.training.epochs, section(config)["optimizer"]["params"]["lr"]) == (9, 0.5)
    assert section(config)["train_batch_size"] == 256
    assert config.origins["training.epochs"] == "file"
    assert command.arguments.resume is None
    with pytest.raises(ConfigError, match=r"run.json: workload: is 'pictures', but 'fluid' stands on the command line"):
        parse(["fluid", "--config", str(path)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr0", "-1"], "--lr0: deepspeed.optimizer.params.lr: "),
        (["--lr0", "nan"], "--lr0: deepspeed.optimizer.params.lr: "),
        (["--epochs", "-1"], "--epochs: training.epochs: input should be greater than 0, found -1"),
        (["--epochs", "0"], r"--warmup_epochs 3: means nothing with this configuration \(ZeroDivisionError"),
        (["--set", "data.img_size=big"], "--set: data.img_size: .*, found \"big\""),
        (["--img_size", "9", "--set", "data.img_size=big"], "--set: data.img_size: "),
        (["--set", "training.steps=5"],
         r"default.json with --epochs by default, .*--set training.steps: training: give either 'epochs' or 'steps'"),
        (["--set", "training.early_stopping={}"], "--set: training.early_stopping.patience: missing"),
        (["--set", "training.seeed=1"], "--set: training.seeed: unknown key; did you mean 'seed'"),
    ],
)  # fmt: skip
def test_a_mistake_is_laid_to_whoever_made_it(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configured(*words)


def test_a_flag_that_is_needed_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="--data_path: is needed: folder with train/ and val/"):
        parse(["pictures"]).draft(1)
    assert parse(["pictures", "--set", "data.path=shots"]).draft(1).values["data"]["path"] == "shots"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["pictures", "--batchsize", "3"],
            r"^--batchsize: unknown flag; did you mean --batch_size\? \(pictures has ",
        ),
        (["pictures", "--epoch=3"], r"^--epoch: unknown flag; did you mean --epochs\?"),
        (["fluid", "--data_path", "x"], r"^--data_path: unknown flag.* \(fluid has --store, --epochs, --steps;"),
        (["pictures", "--data_path", "x", "y"], r"^y: no flag stands before it \("),
        (["pictures", "--set", "a.b=1", "c.d=2"], r"^c.d: no flag stands before it; write --set before it, too \("),
        (["pictured"], "unknown 'pictured'; did you mean 'pictures'"),
        ([], "give --config FILE, or one of the workloads causal_lm, fluid, image_classification, pictures"),
    ],
)
def test_an_unknown_word_is_named_with_the_nearest(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(words)


def test_without_arguments_what_can_be_trained_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([]) == 2
    lines = capsys.readouterr().err.splitlines()
    listed = dict(line.strip().split("  ", 1) for line in lines if line.startswith("  "))
    files = (Path(train.__file__).parents[1] / "configs").glob("*/*.json")
    assert listed.keys() == {f"{file.parent.name}/{file.stem}" for file in files}
    assert min(len(trains.strip()) for trains in listed.values()) > 10
    assert "`python launchers/train.py --config causal_lm/demo --plan` shows what a run would be" in lines[-2]


@pytest.mark.parametrize("command", [evaluate, predict])
def test_help_without_a_run_names_the_flags_of_each_workload(
    command: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    shown = {line.split(":")[0].strip(): line for line in capsys.readouterr().out.splitlines() if ": --" in line}
    flag = {evaluate: "--baselines", predict: "--case"}[command]
    assert {"causal_lm", "fluid", "image_classification", "seq2seq", "token_image"} <= shown.keys()
    assert flag in shown["fluid"]


@pytest.mark.parametrize("before", [[], ["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"]])
def test_what_a_launcher_puts_first_is_no_workload(before: list[str]) -> None:
    command = parse([*before, "pictures", "--data_path", "shots"])
    assert command.file.values["workload"] == "pictures"
    assert command.arguments.local_rank == (1 if before else None)


def test_help_lists_a_workloads_own_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse(["pictures", "--help"])
    said = capsys.readouterr().out
    assert [flag.option for flag in FLAGS if flag.option not in said] == []
    assert "pictures per GPU (without --config: 256)" in said
    assert "--store" not in said


def test_an_empty_path_is_not_the_working_directory(capsys: pytest.CaptureFixture[str]) -> None:
    for main, words, flag in (
        (train.main, ["pictures", "--data_path", "x", "--output-dir", ""], "--output-dir"),
        (evaluate.main, ["--run", ""], "--run"),
        (predict.main, ["--run="], "--run"),
        (export.main, ["--run", "runs/a", "--out", ""], "--out"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        assert f"argument {flag}: give a path, found ''" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["-1", "9" * 30, "1.5", "", "²"])
def test_a_seed_is_one_that_every_generator_takes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"use a whole number from 0 to 2\^63 - 1"):
        seed(text)
    assert seed(str(2**63 - 1)) == 2**63 - 1


def test_a_deepspeed_file_wins_over_what_flags_say_by_default(tmp_path: Path) -> None:
    optimizer = {"type": "SGD", "params": {"lr": 0.5}}
    section = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8, "optimizer": optimizer}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(section))
    words = ["pictures", "--data_path", "x", "--deepspeed", str(file)]
    held = parse(words).draft(1).values["deepspeed"]
    assert {key: held[key] for key in section} == section
    assert parse([*words, "--batch_size", "2"]).draft(1).values["deepspeed"]["train_micro_batch_size_per_gpu"] == 2
