"""The flags of ChatLM's command line: each in its place and meaning, and what they say when a run starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.models.seq2seq.toy_data import toy_store as toy_texts
from tests.models.seq2seq.toy_pairs import SHAPE, toy_config
from trunkline.engine.config.deepspeed_section import BatchSizes, batch_sizes
from trunkline.engine.config.run_config import RunConfig, checked, load_config
from trunkline.engine.errors import ConfigError
from trunkline.engine.optim.parameter_rules import freeze
from trunkline.engine.optim.schedules import learning_rates
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.launchers.command_line import parse
from trunkline.launchers.train import main as launch
from trunkline.models.registry import config_sections, make_task
from trunkline.models.seq2seq.build import head_of, hf_config_of, make_network
from trunkline.models.seq2seq.chat_flags import FROZEN

STORE = ("--store", "data")
FROM = ("--finetune_from", "base.bin")
ROOT = Path(__file__).parents[3]


def configured(*words: str) -> RunConfig:
    return checked(parse(["seq2seq", *STORE, *words]).draft(1), config_sections)


def is_frozen(config: RunConfig) -> bool:
    return [rule.model_dump(exclude_defaults=True) for rule in config.training.parameters] == [
        {"names": tuple(FROZEN["names"]), "frozen": True}
    ]


def file_of(folder: Path, **sections: Any) -> str:
    """A configuration file with rules, a rate and a length of its own."""
    toy_config(folder, folder, **{"training": {"seed": 7}, "model": {"weights": "base.bin"}} | sections)
    return str(folder / "config.json")


def test_without_a_flag_a_run_is_the_originals() -> None:
    config = configured()
    settings = config.training
    assert (settings.epochs, settings.seed, settings.keep_last, settings.parameters) == (8, 23333, 8, ())
    assert batch_sizes(config.deepspeed, 1) == BatchSizes(128, 16, 8, 1)
    assert config.deepspeed.gradient_clipping == 1.0
    assert (config.data.max_source_length, config.data.max_target_length) == (256, 256)
    assert config.deepspeed.bf16 is not None
    assert not config.deepspeed.bf16.enabled, "this device is a CPU"
    assert config.deepspeed.optimizer.type == "AdamWScale"


@pytest.mark.parametrize(("words", "highest", "div"), [([], 5e-3, 50), (["--is_finetune", *FROM], 1.25e-3, 25)])
def test_the_schedule_is_the_originals_one_cycle(words: list[str], highest: float, div: int) -> None:
    """Against torch's own, with the original's arguments."""
    schedule = configured(*words).deepspeed.scheduler
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=highest, epochs=5, steps_per_epoch=8, div_factor=div, cycle_momentum=False
    )
    expected = []
    for _ in range(40):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    found = learning_rates(schedule, highest / div, 40, list(range(40)))
    assert list(found.values()) == pytest.approx(expected, rel=1e-12)
    assert max(expected) == pytest.approx(highest)


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--is_finetune"], True), (["--is_finetune=True"], True), (["--is_finetune=true"], True),
        (["--is_finetune", "true"], True), (["--is-finetune=1"], True), (["--is_finetune=yes"], True),
        (["--is_finetune=False"], False), (["--is_finetune=false"], False), (["--is_finetune", "false"], False),
        (["--is_finetune=0"], False), (["--no-is_finetune"], False), (["--no_is_finetune"], False), ([], False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("where", ["before", "behind"])
def test_is_finetune_in_every_spelling_with_and_without_a_file(
    tmp_path: Path, words: list[str], wanted: bool, where: str
) -> None:
    rest = [*FROM, "--epochs=5", "--learn_rate=1e-5"]
    every = [*words, *rest] if where == "before" else [*rest, *words]
    command = parse(["seq2seq", *STORE, *every])
    config = checked(command.draft(1), config_sections)
    assert is_frozen(config) is wanted
    assert command.name == ("finetune" if wanted else "default")
    assert (config.training.epochs, config.deepspeed.optimizer.params["lr"]) == (5, 1e-5)
    assert config.deepspeed.train_batch_size == (48 if wanted else 128)
    assert any("frozen" in note for note in config.notes) is wanted
    with_file = checked(parse(["--config", file_of(tmp_path), *every]).draft(1), config_sections)
    assert is_frozen(with_file) is wanted
    assert (with_file.training.epochs, with_file.training.steps, with_file.training.seed) == (5, None, 7)
    assert with_file.deepspeed.optimizer.params["lr"] == 1e-5


def test_false_on_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    mine = {"names": ["lm.decoder.final_layer_norm.*"], "lr_scale": 0.5}
    path = file_of(tmp_path, training={"parameters": [FROZEN, mine]})
    for words, count in ((["--is_finetune=false"], 1), (["--is_finetune=true"], 2), ([], 2)):
        config = checked(parse(["--config", path, *words]).draft(1), config_sections)
        assert len(config.training.parameters) == count
        assert config.training.parameters[-1].lr_scale == 0.5


@pytest.mark.parametrize("value", ["maybe", "2", ""])
def test_what_is_neither_true_nor_false_is_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(["seq2seq", *STORE, f"--is_finetune={value}"])
    assert ended.value.code == 2
    assert f"expected true or false, found '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize("unknown", ["--is_fintune=True", "--learning_rate=1e-5", "--epoch=5"])
def test_an_unknown_flag_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unknown: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert launch(["seq2seq", *STORE, unknown]) == 2
    said = capsys.readouterr().err
    name = unknown.partition("=")[0]
    assert f"{name}: unknown flag; did you mean" in said
    assert list(tmp_path.iterdir()) == []


def test_is_finetune_needs_a_model_to_begin_with(tmp_path: Path) -> None:
    for words in (["--is_finetune"], ["--is_finetune", "--set", "model.weights=null"]):
        with pytest.raises(ConfigError, match=r"--is_finetune: needs the model .*--finetune_from FOLDER, .*FILE\.bin"):
            configured(*words)
    assert configured("--is_finetune", "--set", "model.weights=w.bin").model.weights.endswith("/w.bin")
    folder = tmp_path / "named.bin"
    folder.mkdir()
    (folder / "config.json").touch()
    for given in (folder, tmp_path / "folder"):
        model = configured("--is_finetune", "--finetune_from", str(given)).model
        assert (model.path, model.weights, model.preset) == (str(given), None, None)
    model = configured("--finetune_from", "some.bin").model
    assert (model.path, model.weights, model.preset) == (None, str(Path("some.bin").absolute()), "chat")


def test_learn_rate_takes_the_rates_of_the_schedule_along(tmp_path: Path) -> None:
    for words, factor in (([], 50), ([*FROM, "--is_finetune"], 25)):
        config = configured(*words, "--learn_rate", "2e-5")
        assert config.deepspeed.scheduler is not None
        assert config.deepspeed.scheduler.params["max_lr"] == pytest.approx(factor * 2e-5)
        assert config.origins["deepspeed.scheduler.params.max_lr"] == "--learn_rate"
    path = file_of(tmp_path)
    config = checked(parse(["--config", path, "--learn_rate", "2e-5"]).draft(1), config_sections)
    assert config.deepspeed.scheduler is not None
    assert config.deepspeed.scheduler.params == {"warmup": 2}


def test_learn_rate_acts_on_onecycle_without_a_rate_of_the_optimizer_and_on_a_lowest_rate(tmp_path: Path) -> None:
    raw = json.loads(Path(file_of(tmp_path)).read_text())
    section = raw["deepspeed"]
    path = tmp_path / "other.json"

    def rates(kind: str, params: dict[str, Any], optimizer: dict[str, Any]) -> dict[str, Any]:
        section["scheduler"], section["optimizer"]["params"] = {"type": kind, "params": params}, optimizer
        path.write_text(json.dumps(raw))
        draft = parse(["--config", str(path), "--learn_rate", "1e-5"]).draft(1)
        return draft.values["deepspeed"]["scheduler"]["params"]

    one_cycle = {"max_lr": 0.005, "total_steps": 20, "div_factor": 50}
    assert rates("OneCycleLR", one_cycle, {})["max_lr"] == pytest.approx(5e-4)
    assert rates("OneCycleLR", one_cycle, {"lr": 3.0})["max_lr"] == pytest.approx(5e-4)
    lowest = {"T_max": 20, "eta_min": 5e-5}
    assert rates("CosineAnnealingLR", lowest, {"lr": 1e-4})["eta_min"] == pytest.approx(5e-6)
    with pytest.raises(ConfigError, match="eta_min has no ratio to it: set both"):
        rates("CosineAnnealingLR", lowest, {})
    with pytest.raises(ConfigError, match="max_lr is no number to change with it"):
        rates("OneCycleLR", one_cycle | {"max_lr": [0.1, 0.2]}, {})


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--learn_rate=1e-5"], None),
        ([], "rate is 5e-05, which rises to 0.00125; at most 1e-05 is advised"),
        (["--learn_rate=1e-3"], "rate is 0.001, which rises to 0.025; "),
        (["--learn_rate=1e-3", "--set", "deepspeed.optimizer.params.lr=1e-6"], "rate is 0.001, which rises to 0.025; "),
        (["--set", "deepspeed.scheduler.params.max_lr=0.0001"], None),
        (["--set", "deepspeed.optimizer.type=AdamWScale"], "of AdamWScale is relative to each parameter"),
    ],
)
def test_a_rate_above_the_advised_is_noted(words: list[str], said: str | None) -> None:
    high = [note for note in configured("--is_finetune", *FROM, *words).notes if "advised" in note]
    assert ([said in note for note in high] == [True]) if said else not high
    assert not configured(*FROM, "--is_finetune=false", *words).notes


def test_a_tied_head_is_said_to_be_frozen_and_can_be_untied() -> None:
    tied, untied = (configured("--is_finetune", *FROM, *words) for words in ([], ["--untie_head", "true"]))
    assert "with the embedding a head if it is tied to it: --untie_head" in tied.notes[0]
    assert "--untie_head" not in untied.notes[0]
    assert (tied.model.tie_word_embeddings, untied.model.tie_word_embeddings) == (None, False)


@pytest.mark.parametrize(("untie", "trained"), [(False, 94_396_032), (True, 94_396_032 + 22_500_864)])
def test_of_the_chat_preset_half_is_trained(untie: bool, trained: int) -> None:
    config = configured("--is_finetune", *FROM, f"--untie_head={untie}")
    with torch.device("meta"):
        model = freeze(make_network(config.model, hf_config_of(config.model), head_of(config.model)), config)
    sizes = {True: 0, False: 0}
    for parameter in model.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    assert sizes == {True: trained, False: 22_500_864 + 70_795_392}
    if not untie:
        assert round(100 * sizes[True] / sum(sizes.values()), 1) == 50.3


def toy_words(pairs: Path, folder: Path, *words: str) -> list[str]:
    shape = [f"--set=model.{key}={value}" for key, value in SHAPE.items()]
    small = [
        "deepspeed.train_batch_size=16",
        "deepspeed.train_micro_batch_size_per_gpu=8",
        "training.trackers=[]",
        "training.num_workers=0",
        "model.generation.samples=0",
    ]
    return [
        *("seq2seq", "--store", str(pairs), "--output_dir", str(folder), *shape, "--set=model.preset=null"),
        *(f"--set={setting}" for setting in small), *words,
    ]  # fmt: skip


def test_every_value_is_planned_with_its_origin(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base.bin").touch()
    words = ["--is_finetune=True", "--finetune_from", str(tmp_path / "base.bin"), "--learn_rate=1e-3", "--epochs", "2"]
    assert launch(toy_words(pairs, tmp_path, *words, "--plan")) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = {line.split()[0]: line.rpartition("(")[2].rstrip(")") for line in lines if line.endswith(")")}
    assert shown["training.epochs"] == "--epochs"
    assert shown["deepspeed.optimizer.params.lr"] == "--learn_rate"
    assert shown["training.parameters"] == "--is_finetune"
    assert shown["model.weights"] == "--finetune_from"
    assert shown["training.seed"] == "default"
    assert shown["training.ema"] == "default"
    assert shown["model.d_model"] == "command line"
    assert any(line.startswith("note: --is_finetune: the learning rate is 0.001") for line in lines)
    assert any("elements, frozen" in line for line in lines)
    assert next(line for line in lines if line.startswith("tied")).split("=")[-1].strip().startswith("lm.lm_head")
    assert [path.name for path in tmp_path.iterdir()] == ["base.bin"]
    assert launch(toy_words(pairs, tmp_path, "--plan")) == 0
    (lr,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("lr "))
    assert lr.endswith(", each times the root mean square of the parameter"), "AdamWScale's"


def test_a_state_dict_is_fine_tuned_with_its_encoder_frozen_and_a_false_is_no_true(
    pairs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base: Any = make_task(toy_config(tmp_path, pairs)).build_model().lm.state_dict()  # type: ignore[operator, union-attr]
    torch.save(base, tmp_path / "base.bin")
    for value in ("True", "false"):
        words = [f"--is_finetune={value}", "--finetune_from", str(tmp_path / "base.bin"), "--epochs=1"]
        assert launch(toy_words(pairs, tmp_path / value, *words, "--learn_rate=1e-3")) == 0
        said = capfd.readouterr().out
        assert ("note: --is_finetune: the shared embedding and the encoder are frozen" in said) is (value == "True")
        assert ("the learning rate is 0.001" in said) is (value == "True")
        after = load_file(tmp_path / value / "final/model.safetensors")
        same = {name: torch.equal(tensor, base[name]) for name, tensor in after.items()}
        frozen = {name: name.startswith(("shared", "encoder")) and value == "True" for name in after}
        assert same == frozen


def test_the_rate_counts(pairs: Path, tmp_path: Path) -> None:
    """The original's Adafactor had the same weights after 1e-4 as after 0.1."""
    weights = []
    for rate in (1e-4, 0.1):
        optimizer = {"type": "AdamWScale", "params": {"lr": rate}}
        config = toy_config(tmp_path / str(rate), pairs, training={"steps": 2}, deepspeed={"optimizer": optimizer})
        Trainer(make_task(config), config, start(), tmp_path / str(rate) / "run").run()
        weights.append(load_file(tmp_path / str(rate) / "run/final/model.safetensors"))
    assert not any(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_adafactor_is_refused_by_the_name_of_what_stands_for_it(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ['--set=deepspeed.optimizer={"type": "Adafactor", "params": {"lr": 0.01}}', "--plan"]
    assert launch(toy_words(pairs, tmp_path, *settings)) == 2
    assert "use AdamWScale" in capsys.readouterr().err
    assert launch(toy_words(pairs, tmp_path, *settings, "--backend", "fsdp")) == 2
    assert "use AdamWScale" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["chat", "chat-finetune", "t5-base-span-corruption"])
def test_what_is_shipped_is_the_flags_meaning(name: str) -> None:
    config = load_config(ROOT / f"configs/seq2seq/{name}.json", sections=config_sections)
    assert (config.training.keep_last, config.training.seed, config.deepspeed.gradient_clipping) == (8, 23333, 1.0)
    assert config.deepspeed.bf16 is not None
    assert config.deepspeed.bf16.enabled
    assert is_frozen(config) is (name == "chat-finetune")
    schedule = config.deepspeed.scheduler
    if name != "t5-base-span-corruption":
        words = ["--is_finetune", *FROM, "--learn_rate=1e-5"] if name == "chat-finetune" else []
        own = configured(*words).deepspeed
        assert (schedule, config.deepspeed.optimizer) == (own.scheduler, own.optimizer)
    else:
        assert schedule is not None
        assert (schedule.type, schedule.params) == ("InverseSqrt", {"warmup": 10_000})
        assert json.loads((ROOT / f"configs/seq2seq/{name}.json").read_text())["data"]["max_target_length"] == 114


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "trained"),
    [("chat", 187_692_288), ("chat-finetune", 94_396_032), ("t5-base-span-corruption", None)],
)
def test_what_is_shipped_is_planned(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, trained: int | None
) -> None:
    store = toy_texts(tmp_path, "text") if trained is None else pairs
    words = ["--config", f"seq2seq/{name}", "--store", str(store), "--plan", "json"]
    if name == "chat-finetune":
        words += ["--set", "model.path=null", "--set", "model.preset=chat"]
    assert launch(words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["trainable_parameters"] == (trained or plan["parameters"])
    assert plan["origins"]["data.store"] == "--store"


def test_what_cannot_be_fine_tuned_from_is_said_with_what_can(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    for name, said in (("run", "a run's folder: give its best weights"), ("empty", "holds no config.json: give")):
        with pytest.raises(ConfigError, match=said):
            configured("--is_finetune", "--finetune_from", str(tmp_path / name))
    with pytest.raises(ConfigError, match="trains nothing: give a rate above 0"):
        configured("--learn_rate", "0")
