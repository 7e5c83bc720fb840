"""The flags of the JiT trainer: each in its place and meaning, with a file and without."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch

from trunkline.engine.config.deepspeed_section import BatchSizes, batch_sizes
from trunkline.engine.config.run_config import RunConfig, checked
from trunkline.engine.errors import ConfigError
from trunkline.engine.optim.optimizers import build_optimizer
from trunkline.engine.optim.parameter_rules import parameter_groups
from trunkline.engine.optim.schedules import learning_rates
from trunkline.launchers.command_line import parse
from trunkline.launchers.prepare import main as prepare
from trunkline.launchers.train import main as launch
from trunkline.models.registry import config_sections, make_task
from trunkline.models.text.byte_tokenizer import plain_bytes
from trunkline.models.token_image.jit_flags import MODELS, prepare_command
from trunkline.models.token_image.network import PRESETS

DATA = ("--data_path", "texts")


def configured(*words: str, world_size: int = 1) -> RunConfig:
    return checked(parse(["token_image", *DATA, *words]).draft(world_size), config_sections)


def rates(config: RunConfig, steps_per_epoch: int, epochs: int) -> list[float]:
    section = config.in_steps(steps_per_epoch).deepspeed
    total = steps_per_epoch * epochs
    return list(learning_rates(section.scheduler, section.optimizer.params["lr"], total, list(range(total))).values())


def test_without_a_flag_a_run_is_the_originals() -> None:
    config = configured()
    data, training, section = config.data, config.training, config.deepspeed
    assert (config.model.preset, data.img_size, data.capacity, data.encoding) == ("B/4", 64, 4096, "rgb")
    assert (config.model.loss, config.model.noise, config.model.block) == ("x", "linear", "shared_norm")
    assert (training.epochs, training.save_every, training.eval_every) == (100, {"epochs": 10}, {"epochs": 1})
    assert (training.trackers, training.keep_best, training.log_every) == (("tensorboard",), True, 10)
    assert batch_sizes(section, 1) == BatchSizes(4, 4, 1, 1)
    assert batch_sizes(configured(world_size=2).deepspeed, 2) == BatchSizes(8, 4, 1, 2)
    assert section.gradient_clipping == 1.0
    assert not section.bf16.enabled, "this device is a CPU"
    optimizer = build_optimizer(parameter_groups(torch.nn.LayerNorm(4), config), section.optimizer)
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    held = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
    assert held == {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}, "norms and biases too"


@pytest.mark.parametrize("warmup", [0, 2, 5])
def test_the_rate_rises_from_0_and_falls_to_0_step_by_step(warmup: int) -> None:
    """Against the formula of the original."""
    steps, epochs = 7, 20
    rise, total = warmup * steps, epochs * steps
    expected = [
        2e-4 * (step / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / (total - rise))))
        for step in range(total)
    ]
    config = configured("--lr", "2e-4", "--warmup_epochs", str(warmup), "--epochs", str(epochs))
    assert rates(config, steps, epochs) == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_every_flag_reaches_its_place_with_a_file_and_without(tmp_path: Path) -> None:
    plain = tmp_path / "plain.json"
    held = configured().as_dict()
    held["data"]["store"], held["model"]["d_model"], held["training"]["seed"] = "elsewhere", 96, 7
    plain.write_text(json.dumps(held))
    words = shlex.split(
        "--img_size 32 --max_tokens 100 --model jit-l/16 --batch_size 3 --gradient_accumulation_steps 5 --epochs 9 "
        "--use_amp --lr 0.5 --weight_decay 0.25 --warmup_epochs 1.5 --max_grad_norm 2 --save_interval 4 "
        "--log_interval 6 --use_wandb --tokenizer_path tok --use_chat_template --output_dir out"
    )
    for start in (["token_image", *DATA], ["--config", str(plain), *DATA]):
        command = parse([*start, *words])
        config = checked(command.draft(2), config_sections)
        data, model, training, section = config.data, config.model, config.training, config.deepspeed
        assert (data.store, data.img_size, data.capacity) == (str(Path("texts").absolute()), 32, 100)
        assert (data.tokenizer, data.chat_template) == (str(Path("tok").absolute()), True)
        assert (model.preset, model.shape) == ("L/16", PRESETS["L/16"]), "widths of the file give way"
        assert batch_sizes(section, 2) == BatchSizes(30, 3, 5, 2)
        assert section.optimizer.params["lr"] == 0.5
        assert section.optimizer.params["weight_decay"] == training.parameters[0].weight_decay == 0.25
        assert section.scheduler.params["warmup"] == {"epochs": 1.5}
        assert (section.gradient_clipping, section.bf16.enabled) == (2, True)
        assert (training.epochs, training.save_every, training.log_every) == (9, {"epochs": 4}, 6)
        assert training.trackers == ("tensorboard", "wandb")
        assert command.arguments.output_dir == Path("out")
        assert [note for note in config.notes if "no GPU: bf16 on the CPU" in note]
        assert training.seed == (42 if start[0] == "token_image" else 7)


def test_with_a_file_only_the_flags_that_are_given_act(tmp_path: Path) -> None:
    held = configured("--lr", "0.5", "--epochs", "9", "--use_wandb", "--img_size", "32").as_dict()
    held["deepspeed"] |= {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}}
    del held["deepspeed"]["gradient_accumulation_steps"]
    held["training"]["parameters"] = [{"names": ["*.output.*"], "weight_decay": 0.5}]
    path = tmp_path / "run.json"
    path.write_text(json.dumps(held))
    words = ["--config", str(path), "--batch_size", "4", "--no-use_wandb", "--weight_decay", "0.3", "--use_amp=false"]
    config = checked(parse(words).draft(2), config_sections)
    assert batch_sizes(config.deepspeed, 2) == BatchSizes(48, 4, 6, 2), "as much is accumulated as before"
    assert (config.training.epochs, config.data.img_size, config.training.trackers) == (9, 32, ("tensorboard",))
    assert config.deepspeed.optimizer.params == {"lr": 0.5, "betas": [0.9, 0.999], "weight_decay": 0.3}
    assert config.training.parameters[0].weight_decay == 0.5, "the file has rules of its own"
    assert not config.deepspeed.bf16.enabled
    assert not config.notes


def test_the_models_are_the_presets() -> None:
    assert [name.removeprefix("JiT-") for name in MODELS] == list(PRESETS)
    for name in MODELS:
        for spelt in (name, name.lower(), name.removeprefix("JiT-")):
            assert configured("--model", spelt, "--img_size", "64").model.shape == PRESETS[name.removeprefix("JiT-")]


def test_raw_texts_are_answered_with_the_command_that_prepares_them_and_the_store_is_held_against_its_flags(
    tmp_path: Path,
) -> None:
    source = tmp_path / "my texts.jsonl"
    source.write_text(
        "".join(json.dumps({"prompt": f"{n}", "answer": f"{n} squared is {n * n}"}) + "\n" for n in range(200))
    )
    for name, template in (("tok", "{{ messages[0].content }}{{ messages[1].content }}"), ("other", "{{ messages }}")):
        tokenizer = plain_bytes()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
    own = ("--tokenizer_path", str(tmp_path / "tok"), "--use_chat_template")
    with pytest.raises(ConfigError, match=rf"--data_path {source}: holds texts, and a run reads a") as raised:
        parse(["token_image", "--data_path", str(source), *own]).draft(1)
    message = str(raised.value)
    store = message.rpartition("train with --data_path ")[2]
    command = shlex.split(message.partition("`")[2].partition("`")[0])
    assert command[:3] == ["python", "launchers/prepare.py", "token_image"]
    assert prepare(command[2:]) == 0
    small = ["--img_size", "16", "--set", "model.preset=null"]
    small += [f"--set=model.{key}" for key in ("patch=4", "d_model=32", "num_layers=1", "num_heads=2")]

    def task(*words: str) -> None:
        make_task(configured("--data_path", store, *small, *words))

    task()
    task(*own)
    for words, said in (
        (
            ["--tokenizer_path", str(tmp_path / "other")],
            f"{tmp_path}/other: data.store {store} was .* another tokenizer",
        ),
        (["--tokenizer_path", str(tmp_path / "none")], f"{tmp_path}/none: no such folder"),
        (["--no-use_chat_template"], "data.chat_template: False: .* was prepared with a chat template: prepare"),
    ):
        with pytest.raises(ConfigError, match=said):
            task(*words)


def test_a_store_without_a_template_is_not_one_with_it(texts: Path) -> None:
    config = configured("--data_path", str(texts), "--img_size", "16", "--use_chat_template")
    with pytest.raises(ConfigError, match=r"data.chat_template: True: .*without a chat template: prepare"):
        make_task(config)


def test_without_a_tokenizer_the_command_trains_one() -> None:
    assert prepare_command("a/b.txt", None, None).endswith("--source a/b.txt --out a/b-store --train-tokenizer")
    assert prepare_command("a", None, True).endswith("--tokenizer FOLDER --use-chat-template"), "which has the template"


SHIPPED = {"b4": 127_681_584, "b16-256": 129_341_184, "l16-256": 455_729_920, "h16-256": 947_282_688}
"""Parameters. Those of 256 x 256 pixels have 16 rows and columns of patches, for 4 at 64 x 64."""


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_shipped_is_the_recipe_of_the_flags(name: str) -> None:
    file = checked(parse(["--config", f"token_image/{name}", *DATA]).draft(1), config_sections)
    flags = configured("--model", file.model.preset, "--img_size", str(file.data.img_size), "--use_amp")
    held, wanted = file.as_dict(), flags.as_dict()
    assert held["training"].pop("best") == {"metric": "loss", "mode": "min"}, "which auto comes to"
    for key in ("best", "num_workers", "activation_checkpointing"):
        held["training"].pop(key, None)
        wanted["training"].pop(key)
    for section in ("data", "model", "training"):
        assert held[section] == wanted[section]
    for key in ("optimizer", "scheduler", "gradient_clipping", "bf16", "fp16"):
        assert held["deepspeed"][key] == wanted["deepspeed"][key]
    if name in ("b4", "b16-256"):
        for ranks in (1, 2, 8):
            assert batch_sizes(file.deepspeed, ranks) == BatchSizes(4 * ranks, 4, 1, ranks)
    else:
        assert file.training.activation_checkpointing
        assert [batch_sizes(file.deepspeed, ranks).global_batch_size for ranks in (1, 2, 8)] == [256] * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_shipped_is_planned(texts: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    words = ["--config", f"token_image/{name}", "--data_path", str(texts), "--plan", "json", "--world-size", "8"]
    assert launch(words) == 0
    plan = json.loads(capsys.readouterr().out)
    count = plan["parameters"]
    assert count == SHIPPED[name]
    memory, stage = plan["memory_bytes"], plan["config"]["deepspeed"]["zero_optimization"]["stage"]
    shards = {"optimizer": 8 if stage else 1, "gradients": 8 if stage > 1 else 1, "parameters": 8 if stage > 2 else 1}
    for what, width in (("optimizer", 8), ("gradients", 2), ("parameters", 2)):
        assert memory[what] == pytest.approx(width * count / shards[what], rel=0.01), what
    assert memory["activations"] > 0
    assert plan["learning_rate"]["step 0"] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch_size", "0"], "argument --batch_size: expected a number from 1 on, found '0'"),
        (["--gradient_accumulation_steps", "x"], "argument --gradient_accumulation_steps: expected a number from 1 on"),
        (["--model", "JiT-B/8"], "argument --model: unknown 'JiT-B/8'; did you mean 'JiT-B/4'?"),
        (["--model", "XL"], "argument --model: unknown 'JiT-XL'"),
        (["--img_size", "1000"], "--img_size: data.img_size: .*found 1000"),
        (["--max_tokens", "5000"], "--max_tokens.*max_tokens 5000: an image of img_size 64 has 4096"),
        (["--save_interval", "0"], "--save_interval: training.save_every: .*of epochs above 0"),
        (["--epochs", "0"], "--epochs: training.epochs: .*found 0"),
        (["--lr", "-1"], "--lr: deepspeed.optimizer.params.lr: .*found -1"),
        (["--max_grad_norm", "-1"], "--max_grad_norm: deepspeed.gradient_clipping: .*found -1"),
        (["--warmup_epochs", "-1"], "--warmup_epochs: deepspeed.scheduler.params.warmup: .*found"),
        (["--use_amp", "half"], "argument --use_amp: expected true or false, found 'half'"),
        (["--batchsize", "4"], "--batchsize: unknown flag; did you mean --batch_size?"),
        (["--resume", "checkpoint_epoch_3.pth"], "checkpoint_epoch_3.pth: there is no checkpoint in it; give"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_message_that_says_what_to_use(
    texts: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["token_image", "--data_path", str(texts), "--output_dir", str(tmp_path / "run"), *words]
    try:
        status = launch(run)
    except SystemExit as ended:  # where argparse finds it
        status = int(str(ended.code))
    assert status == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(said.replace("?", "[?]"), last), last
