"""The flags of the FastAI-compatible command line: each in its place and meaning, or an error that says more."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.image_classification.small_images import asked, write_images
from trunkline.engine.config.deepspeed_section import BatchSizes, batch_sizes
from trunkline.engine.config.run_config import RunConfig, checked
from trunkline.engine.errors import ConfigError
from trunkline.engine.optim.optimizers import build_optimizer
from trunkline.engine.optim.schedules import build_scheduler, learning_rates
from trunkline.engine.record.boards import unused_settings
from trunkline.engine.tracking import Tracking
from trunkline.launchers.command_line import parse
from trunkline.launchers.train import main as launch
from trunkline.models.image_classification.architectures import ARCHITECTURES
from trunkline.models.image_classification.flags import DEFAULTS, FLAGS
from trunkline.models.registry import config_sections

DATA = ("--data_path", "shots")


def configured(*words: str, world_size: int = 1) -> RunConfig:
    return asked(*DATA, *words, world_size=world_size)[1]


def group(config: RunConfig, epoch: int, steps_per_epoch: int = 7) -> dict[str, Any]:
    """The optimizer and its settings in the first step of an epoch."""
    epochs = config.training.epochs
    assert epochs is not None
    section = config.in_steps(steps_per_epoch).deepspeed
    optimizer = build_optimizer([torch.nn.Parameter(torch.zeros(1))], section.optimizer)
    build_scheduler(optimizer, section.scheduler, epochs * steps_per_epoch).forward(epoch * steps_per_epoch)
    return {**optimizer.param_groups[0], "kind": type(optimizer).__name__}


def test_without_a_flag_a_run_is_the_originals() -> None:
    command, config = asked(*DATA)
    assert (config.training.epochs, config.training.early_stopping.patience) == (100, 100)
    assert (config.model.arch, config.data.img_size) == ("resnet18", 224)
    assert batch_sizes(config.deepspeed, 1) == BatchSizes(256, 256, 1, 1)
    assert (command.arguments.resume, command.arguments.output_dir) == ("auto", None)
    first = group(config, 0)
    assert (first["kind"], first["weight_decay"], first["betas"]) == ("Adam", 0.01, (0.9, 0.999))
    wanted = {0: 0.001, 1: 0.004, 2: 0.007, 3: 0.01, 50: 0.0057185, 99: 0.0010024}
    assert {epoch: group(config, epoch)["lr"] for epoch in wanted} == pytest.approx(wanted, abs=5e-8)
    every = {"epochs": 1}
    settings = config.training
    assert (settings.eval_every, settings.save_every, settings.log_every) == (every, every, every)
    assert (settings.keep_best, settings.log_means) == (True, True)
    assert config.source == str(DEFAULTS)


@pytest.mark.parametrize("how", [["image_classification"], ["--workload", "image_classification"],
                                 ["--workload=image_classification"]])  # fmt: skip
def test_the_workload_is_named_first_or_by_a_flag(how: list[str]) -> None:
    for words in ([*how, *DATA, "--lr0", "0.5"], [*DATA, *how, "--lr0", "0.5"]):
        if how[0].startswith("--") or words[0] == how[0]:
            assert parse(words).draft(1).values["deepspeed"]["optimizer"]["params"]["lr"] == 0.5
    with pytest.raises(ConfigError, match="--workload: needs a name"):
        parse(["--workload"])


@pytest.mark.parametrize(
    ("words", "world_size", "micro", "steps", "normalised"),
    [
        ([], 8, 256, 1, 32),
        (["--batch_size", "48"], 1, 48, 5, 24),
        (["--batch_size", "48", "--grad_acc=-1"], 2, 48, 1, 24),
        (["--grad_acc", "3", "--batch-size", "20"], 2, 20, 3, 20),
        (["--grad_acc", "0", "--batch_size", "100"], 1, 100, 2, 25),
        (["--batch_size", "7", "--set", "model.batch_norm_group=1"], 1, 7, 36, 1),
    ],
)
def test_batch_size_is_per_gpu_and_bounds_what_is_normalised_together(
    words: list[str], world_size: int, micro: int, steps: int, normalised: int
) -> None:
    config = configured(*words, world_size=world_size)
    found = batch_sizes(config.deepspeed, world_size)
    assert found == BatchSizes(micro * steps * world_size, micro, steps, world_size)
    assert config.model.batch_norm_group == normalised


@pytest.mark.parametrize(
    ("name", "kind", "rise", "more"),
    [
        ("SGD", "SGD", (0.85, 0.9), {"nesterov": True}),
        ("adam", "Adam", None, {}),
        ("AdamW", "AdamW", None, {}),
        ("RMSPROP", "RMSprop", (0.85, 0.9), {}),
    ],
)
def test_each_optimizer_is_torchs_with_the_originals_momentum(
    name: str, kind: str, rise: tuple[float, float] | None, more: dict[str, Any]
) -> None:
    config = configured("--optimizer", name, "--wd", "0.5")
    first, later = group(config, 0), group(config, 3)
    assert (first["kind"], first["weight_decay"]) == (kind, 0.5)
    assert ((first["momentum"], later["momentum"]) if rise else None) == (pytest.approx(rise) if rise else None)
    assert {key: first[key] for key in more} == more


@pytest.mark.parametrize(
    ("words", "last"),
    [
        (["--lrf", "0.2"], 0.002),
        (["--lrf", "0.001"], 0.0001),  # min_lr is a hundredth of lr0 by default
        (["--lrf", "0.001", "--min_lr", "0.00005"], 0.00005),
        (["--min_lr", "0.004"], 0.004),
        (["--lr0", "0.1", "--lrf", "0"], 0.001),
        (["--scheduler_type", "constant"], 0.01),
    ],
)
def test_the_last_rate_is_the_greater_of_a_share_and_a_rate(words: list[str], last: float) -> None:
    config = configured(*words).in_steps(7)
    rates = learning_rates(config.deepspeed.scheduler, config.deepspeed.optimizer.params["lr"], 700, [700])
    assert rates[700] == pytest.approx(last, rel=1e-9)


def test_the_schedule_steps_by_steps_on_request_and_warms_up_for_as_long_as_is_asked() -> None:
    config = configured("--warmup_epochs", "0.5", "--set", "deepspeed.scheduler.params.every=1").in_steps(10)
    rates = learning_rates(config.deepspeed.scheduler, 0.01, 1000, [0, 1, 5])
    assert list(rates.values()) == pytest.approx([0.001, 0.0028, 0.01])
    assert configured("--warmup_epochs", "0").deepspeed.scheduler.params["warmup"] == 0


@pytest.mark.parametrize(
    ("words", "resume", "folder"),
    [
        (["--no-auto-resume"], "none", None),
        (["--no-auto_resume"], "none", None),
        (["--auto_resume", "--resume", "none"], "none", None),
        (["--model_path", "models"], "auto", Path("models")),
        (["--task_name", "a first/try"], "auto", Path("runs/image_classification/a-first-try-a5b5c0")),
        (["--model_path", "models", "--task_name", "one"], "auto", Path("models")),
    ],
)
def test_the_runs_folder_and_whether_it_is_resumed_from(words: list[str], resume: str, folder: Path | None) -> None:
    arguments = asked(*DATA, *words)[0].arguments
    assert (arguments.resume, arguments.output_dir) == (resume, folder)


def test_every_other_flag_reaches_its_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = configured(
        "--train_size", "90", "--val-size", "9", "--size_per_class", "--img_size=64", "--arch", "ResNet34",
        "--pretrained", "resnet34.pth", "--load_model", "old/best.pth", "--early_stopping", "7", "--project_name",
        "shop", "--task-name", "one", "--mlflow_tracking_uri", "http://127.0.0.1:5000", "--skip_mlflow_model_upload",
        "--device", "0,1", "--distributed", world_size=2,
    )  # fmt: skip
    data, model, training = config.data, config.model, config.training
    assert (data.train_size, data.val_size, data.size_per_class, data.img_size) == (90, 9, True, 64)
    assert (model.arch, model.pretrained) == ("resnet34", str(Path("resnet34.pth").absolute()))
    assert (training.start_from, training.early_stopping.patience) == (str(Path("old/best.pth").absolute()), 7)
    assert training.tracked.model_dump() == {
        "experiment": "shop", "run": "one", "uri": "http://127.0.0.1:5000", "leave_out": ("best", "best.pth"),
    }  # fmt: skip
    assert training.trackers == ("tensorboard", "mlflow")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert configured("--device", "cpu").training.tracked.run is None
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert configured("--early_stopping", "0").training.early_stopping is None
    assert configured("--arch", str(tmp_path)).model.path == str(tmp_path)
    (tmp_path / "store.json").write_text("{}")
    assert asked("--data_path", str(tmp_path))[1].data.store == str(tmp_path)


def test_mlflow_is_on_where_it_is_installed_unless_it_is_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = importlib.util.find_spec("json")
    for installed, words, trackers in (
        (True, [], ("tensorboard", "mlflow")),
        (False, [], ("tensorboard",)),
        (True, ["--disable_mlflow"], ("tensorboard",)),
        (False, ["--mlflow_tracking_uri", "sqlite:///x.db"], ("tensorboard", "mlflow")),  # which says what to install
        (True, ["--mlflow_tracking_uri", "sqlite:///x.db", "--disable_mlflow"], ("tensorboard",)),
    ):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, there=installed: found if there else None)
        config = configured(*words)
        assert config.training.trackers == trackers
        lines = unused_settings(config, Tracking())
        assert [line.split()[0] for line in lines] == ["training.tracked.uri"] * (words[2:] == ["--disable_mlflow"])
    assert "--mlflow_tracking_uri" in lines[0]
    skinny = {"mlflow": found, "sqlalchemy": None}  # which has no place for runs of its own
    monkeypatch.setattr(importlib.util, "find_spec", skinny.get)
    assert configured("--no-export_onnx").training.trackers == ("tensorboard",)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert configured("--no-export_onnx").training.trackers == ("tensorboard", "mlflow")


def test_mixed_precision_is_for_gpus_unless_it_is_asked_for() -> None:
    def kinds(*words: str) -> tuple[bool, bool]:
        section = configured(*words).deepspeed
        return section.bf16.enabled, section.fp16.enabled

    assert (kinds(), kinds("--amp"), kinds("--no-amp")) == ((False, False), (True, False), (False, False))


def test_with_a_file_only_the_flags_that_are_given_act(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(configured("--lr0", "0.5", "--epochs", "9").as_dict()))
    command = parse(["--config", str(path), "--scheduler_type", "linear", "--optimizer", "SGD", "--batch_size", "8"])
    config = checked(command.draft(1), config_sections)
    assert (config.training.epochs, config.deepspeed.optimizer.params["lr"]) == (9, 0.5)
    assert (config.deepspeed.scheduler.params["shape"], config.deepspeed.scheduler.params["start_momentum"]) == (
        "linear",
        0.85,
    )
    assert command.arguments.resume is None
    rules = checked(parse(["--config", str(path), "--wd", "0.25"]).draft(1), config_sections).training.parameters
    assert [rule.weight_decay for rule in rules] == [0.25], "also in the file of a run, which has all of a rule's keys"
    held = json.loads(path.read_text())
    held["deepspeed"]["scheduler"] = {"type": "WarmupCosine", "params": {}}
    held["training"]["eval_every"] = 500
    path.write_text(json.dumps(held))
    config = checked(parse(["--config", str(path), "--scheduler_type", "step"]).draft(1), config_sections)
    assert config.deepspeed.scheduler.type == "WarmupShape"
    with pytest.raises(ConfigError, match=r"--early_stopping 5: counts epochs, and this run evaluates by steps"):
        parse(["--config", str(path), "--early_stopping", "5"]).draft(1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "0,1"], "--device 0,1: this is one process, .*torchrun --nproc_per_node 2"),
        (["--device", "0"], "--device 0: PyTorch sees 0 GPUs, so there is no 0"),
        (["--only_val", "--val_size", "4"], "--only_val: measures all of val/: leave --val_size out"),
        (["--device", "gpu"], "--device gpu: expected numbers of GPUs such as 0,1,2,3, or cpu"),
        (["--distributed"], "--distributed: this is one process: start `torchrun"),
        (
            ["--only_val", "--load_model", "best.pth"],
            "--only_val: evaluates a run of this program: .*--load_model FILE",
        ),
        (["--pretrained"], "--pretrained: weights are not downloaded: give the .pth or .safetensors file"),
        (["--batch_size", "0"], "--batch_size 0: give the number of images per GPU"),
        (["--batch_size", "37"], "--batch_size 37: BatchNorm's .*would have 1 here: use 32, or another"),
        (["--grad_acc", "-3"], "--grad_acc -3: give -1 for none, 0 for about 256 images"),
        (["--epochs", "0"], "--epochs: training.epochs: input should be greater than 0, found 0"),
        (["--early_stopping", "-3"], "--early_stopping -3: give a number of epochs, or 0 for never"),
        (["--lr0", "-1"], "--lr0: deepspeed.optimizer.params.lr: .*found -1"),
        (["--lrf", "2"], "--lrf: deepspeed.scheduler.params.min_ratio: .*found 2"),
        (["--warmup_epochs", "-1"], "--warmup_epochs: deepspeed.scheduler.params.warmup: .*found"),
        (["--img_size", "4"], "--img_size: data.img_size: .*found 4"),
        (["--train_size", "0"], "--train_size: data.train_size: .*found 0"),
        (["--learning_rate", "1"], "--learning_rate: unknown flag"),
        (["--batchsize", "1"], "--batchsize: unknown flag; did you mean --batch_size?"),
    ],
)
def test_a_mistake_is_one_message_that_says_what_to_use(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        configured(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arch", "resnet43"], "argument --arch: unknown 'resnet43'; did you mean 'resnet34'?"),
        (["--scheduler_type", "cosin"], "argument --scheduler_type: unknown 'cosin'; did you mean 'cosine'?"),
        (["--optimizer", "lion"], "argument --optimizer: unknown 'lion'; known: Adam, AdamW, RMSprop, SGD"),
        (["--lr0", "fast"], "argument --lr0: invalid float value: 'fast'"),
    ],
)
def test_a_wrong_name_is_answered_with_the_nearest(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        configured(*words)
    assert message in capsys.readouterr().err


def test_a_lowest_rate_above_the_highest_is_refused() -> None:
    config = configured("--min_lr", "5").in_steps(7)
    with pytest.raises(ConfigError, match=r"min_lr 5 is above the optimizer's lr 0.01: write a lower one"):
        learning_rates(config.deepspeed.scheduler, 0.01, 700, [0])


def test_the_data_is_asked_for_and_models_are_listed_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="--data_path: is needed: folder with train/ and val/"):
        parse(["image_classification"]).draft(1)
    for words, names in ((["--list-models"], ARCHITECTURES), (["--list_models", "resnet1"], ("resnet18", "resnet101"))):
        with pytest.raises(SystemExit, match="0"):
            parse(["image_classification", *words]).draft(1)
        assert set(names) <= set(capsys.readouterr().out.split())


def test_decay_is_of_all_parameters_unless_a_file_has_rules_of_its_own(tmp_path: Path) -> None:
    for words, wanted in (((), 0.01), (("--wd", "0.5"), 0.5)):
        (rule,) = configured(*words).training.parameters
        assert (list(rule.names), rule.weight_decay) == (["*"], wanted)
    held = json.loads(DEFAULTS.read_text())
    held["training"] |= {"epochs": 2, "parameters": [{"names": ["classifier.*"], "weight_decay": 0.2}]}
    held["data"], held["model"] = {"path": "shots"}, {"arch": "resnet18"}
    held["deepspeed"] |= {"train_batch_size": 32}
    (tmp_path / "own.json").write_text(json.dumps(held))
    config = checked(parse(["--config", str(tmp_path / "own.json"), "--wd", "0.5"]).draft(1), config_sections)
    assert [rule.weight_decay for rule in config.training.parameters] == [0.2]
    assert config.deepspeed.optimizer.params["weight_decay"] == 0.5


def test_a_network_without_trained_batch_norms_has_no_group(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    for words in (["--arch", "vit_base_patch16"], ["--arch", str(tmp_path)]):
        config = configured(*words, "--batch_size", "37")
        assert config.model.batch_norm_group == 32, "the default, which has no effect"
    held = json.loads(DEFAULTS.read_text())
    held["training"]["epochs"] = 2
    held["data"], held["model"] = {"path": "shots"}, {"arch": "resnet18", "normalization": "group"}
    (tmp_path / "own.json").write_text(json.dumps(held))
    config = checked(parse(["--config", str(tmp_path / "own.json"), "--batch_size", "24"]).draft(1), config_sections)
    assert (config.model.normalization, config.model.batch_norm_group) == ("group", 32)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_a_shipped_resnet_has_the_optimizer_of_the_flags_and_saves_each_new_best(name: str) -> None:
    config = checked(parse(["--config", f"image_classification/{name}"]).draft(1), config_sections)
    flags = configured("--arch", name)
    for held in (config, flags):
        assert held.deepspeed.optimizer.params["adam_w_mode"] is False
        assert [(rule.names, rule.weight_decay) for rule in held.training.parameters] == [(("*",), 0.01)]
        assert held.training.keep_best


def test_early_stopping_begins_where_a_file_has_none(tmp_path: Path) -> None:
    words = ["--config", "image_classification/demo", "--early_stopping", "6"]
    assert checked(parse(words).draft(1), config_sections).training.early_stopping.patience == 3, "2 epochs a piece"
    with pytest.raises(ConfigError, match=r"--min_lr 0\.001: is of the schedule WarmupShape, not of WarmupCosine"):
        parse(["--config", "image_classification/demo", "--min_lr", "0.001"]).draft(1)


def test_only_val_hands_on_the_batch_size() -> None:
    instead = asked(*DATA, "--only_val", "--batch_size", "48")[0].arguments.instead
    assert instead[instead.index("--batch-size") + 1] == "48"


def test_only_val_trains_nothing_and_measures_the_runs_best_weights(tmp_path: Path) -> None:
    data, run = write_images(tmp_path / "data"), tmp_path / "run"
    words = ["image_classification", "--data_path", str(data), "--arch", "resnet_tiny", "--img_size", "32",
             "--batch_size", "4", "--epochs", "1", "--disable_mlflow", "--no-export_onnx",
             "--model_path", str(run)]  # fmt: skip
    assert launch(words) == 0
    before = {path: path.read_bytes() for path in run.rglob("*.jsonl")}
    (trained,) = [row for row in map(json.loads, (run / "metrics.jsonl").open()) if row["split"] == "val"]
    assert launch([*words, "--only_val"]) == 0
    assert {path: path.read_bytes() for path in run.rglob("*.jsonl")} == before
    found = json.loads((run / "evaluation" / "evaluation.json").read_text())
    assert found["split"] == "val"
    assert found["metrics"]["loss"] == pytest.approx(trained["loss"], abs=1e-6)


def test_help_lists_the_flags_and_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; from trunkline.launchers.command_line import parse\n"
        "try: parse(['image_classification', '--help'])\n"
        "finally: sys.exit(' '.join({'torch', 'pydantic', 'transformers', 'numpy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert [flag.option for flag in FLAGS if f"{flag.option} " not in done.stdout] == []
