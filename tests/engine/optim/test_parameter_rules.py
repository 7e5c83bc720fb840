"""Rules for parameters: which parameter gets what, the same training as a plain loop on every layout, and resumes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.distributed import run_distributed_test
from tests.engine.tiny import Net, TinyModel, TinyTask, tiny_config
from trunkline.engine.config.deepspeed_section import Scheduler
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.data.order import FILLER, GlobalBatches
from trunkline.engine.data.randomness import seed_torch
from trunkline.engine.errors import ConfigError
from trunkline.engine.optim.parameter_rules import (
    freeze,
    notes_of_earlier_version,
    parameter_groups,
    planned_rules,
    treatments,
)
from trunkline.engine.optim.schedules import build_scheduler, learning_rates
from trunkline.engine.plan import make_plan
from trunkline.engine.plan_text import render_summary
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer

RULES: list[dict[str, Any]] = [
    {"names": ["enter.weight"], "frozen": True},
    {"names": ["blocks.0.*"], "lr_scale": 0.25},
    {"names": ["blocks.1.*"], "weight_decay": 0.2, "lr_scale": 2.0},
]
EMA: dict[str, Any] = {"decay": 0.8, "warmup": True, "every": 2, "use": ["evaluation"]}
"""With it best/ holds the average, and final/ the weights."""
LAYOUTS = [("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3), ("fsdp", 3)]


def configuration(
    folder: Path, stage: int = 0, rules: list[dict[str, Any]] | None = None, **training: Any
) -> RunConfig:
    """Weight decay that shows, and batches of 16 out of 40 samples, so that the last of an epoch is short."""
    return tiny_config(
        folder,
        training={"parameters": RULES if rules is None else rules, "eval_every": 99, "save_every": 99, "ema": EMA}
        | training,
        deepspeed={
            "train_batch_size": 16, "zero_optimization": {"stage": stage},
            "optimizer": {"type": "AdamW", "params": {"lr": 0.02, "weight_decay": 0.1}},
        },
    )  # fmt: skip


def train(folder: Path, config: RunConfig, backend: str = "deepspeed", resume: str = "none") -> None:
    Trainer(TinyTask(config.data, config.model), config, start(), folder, backend=backend, resume=resume).run()


def groups_by_hand(model: nn.Module, lr: float, decay: float) -> list[dict[str, Any]]:
    """RULES, written out."""
    groups = []
    for name, parameter in model.named_parameters():
        spared = name.endswith("bias") or ".norm." in name
        options: dict[str, Any] = {"weight_decay": 0.0 if spared else decay, "scale": 1.0}
        if name.startswith("blocks.0."):
            options["scale"] = 0.25
        elif name.startswith("blocks.1."):
            options = {"weight_decay": 0.2, "scale": 2.0}
        if name != "enter.weight":
            groups.append({"params": [parameter], "lr": lr, **options})
    return groups


def plain_loop(config: RunConfig, ema: Mapping[str, Any] | None = None) -> tuple[dict[str, torch.Tensor], ...]:
    """The weights after the run, and their average: torch alone, whole global batches, groups by hand."""
    task = TinyTask(config.data, config.model)
    seed_torch(config.training.seed, 0)
    model = task.build_model()
    model.enter.weight.requires_grad_(not config.training.parameters)  # type: ignore[union-attr, operator]
    params, steps = config.deepspeed.optimizer.params, int(config.training.steps or 0)
    optimizer = torch.optim.AdamW(groups_by_hand(model, params["lr"], params["weight_decay"]))
    rates = learning_rates(config.deepspeed.scheduler, params["lr"], steps, list(range(steps)))
    rows = task.dataset("train")
    batches = GlobalBatches(len(rows), config.deepspeed.train_batch_size or 0, config.training.seed)
    average, updates = {name: p.detach().clone() for name, p in model.named_parameters()}, 0
    for step in range(steps):
        chosen = [index for index in batches.samples(step) if index != FILLER]
        points, targets = (torch.cat([rows[index][part] for index in chosen]) for part in (0, 1))
        optimizer.zero_grad()
        (model(points) - targets).square().mean().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, config.deepspeed.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = rates[step] * group["scale"]
        optimizer.step()
        if ema is not None and (step + 1) % ema["every"] == 0:
            decay = min(ema["decay"], (1 + updates) / (10 + updates)) if ema["warmup"] else ema["decay"]
            for name, parameter in model.named_parameters():
                average[name] = decay * average[name] + (1 - decay) * parameter.detach()
            updates += 1
    return {name: p.detach() for name, p in model.named_parameters()}, average


def assert_equal(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_as_a_plain_loop(folder: Path, config: RunConfig) -> None:
    weights, average = plain_loop(config, EMA)
    assert_equal(load_file(folder / "final" / "model.safetensors"), weights)
    assert_equal(load_file(folder / "best" / "model.safetensors"), average)
    *_, measured = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert measured["loss"] == pytest.approx(validation_loss(config, average), rel=1e-6), "of the average"


def validation_loss(config: RunConfig, weights: dict[str, torch.Tensor]) -> float:
    task = TinyTask(config.data, config.model)
    rows, model = task.dataset("val"), task.build_model()
    model.load_state_dict(weights, strict=False)
    points, targets = (torch.cat([rows[index][part] for index in range(len(rows))]) for part in (0, 1))
    return float((model(points) - targets).square().mean())


@pytest.mark.parametrize(("backend", "stage"), LAYOUTS)
def test_rules_and_average_are_those_of_a_plain_loop_with_groups(tmp_path: Path, backend: str, stage: int) -> None:
    config = configuration(tmp_path, stage)
    train(tmp_path / "run", config, backend)
    assert_as_a_plain_loop(tmp_path / "run", config)


def train_on_a_rank(rank: int, world_size: int, folder: Path, layouts: list[tuple[str, int]]) -> None:
    for backend, stage in layouts:
        train(folder / f"{backend}-{stage}", configuration(folder / f"{rank}-{backend}-{stage}", stage), backend)


@pytest.mark.distributed
def test_rules_and_average_on_two_ranks_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    run_distributed_test(train_on_a_rank, 2, tmp_path, LAYOUTS, backend=None)
    for backend, stage in LAYOUTS:
        assert_as_a_plain_loop(tmp_path / f"{backend}-{stage}", configuration(tmp_path))


SCHEDULES: dict[str, dict[str, Any]] = {
    "WarmupCosine": {"warmup": 3}, "WarmupLinear": {"warmup": 0.2}, "Constant": {"warmup": 2},
    "WarmupShape": {"shape": "cosine_restarts", "warmup": 4, "every": 2},
    "WarmupLR": {"warmup_max_lr": 0.3, "warmup_num_steps": 4}, "WarmupCosineLR": {"total_num_steps": 20},
    "WarmupDecayLR": {"total_num_steps": 20, "warmup_num_steps": 5, "warmup_max_lr": 0.2},
    "OneCycle": {"cycle_min_lr": 0.01, "cycle_max_lr": 0.2, "cycle_first_step_size": 6}, "LRRangeTest": {},
    "OneCycleLR": {"max_lr": 0.3, "total_steps": 20}, "StepLR": {"step_size": 4},
    "CosineAnnealingLR": {"T_max": 20, "eta_min": 0.01}, "PolynomialLR": {"total_iters": 20},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 5, "cycle_momentum": False},
}  # fmt: skip


@pytest.mark.parametrize("kind", SCHEDULES)
def test_lr_scale_multiplies_what_any_schedule_gives(kind: str) -> None:
    section = Scheduler(type=kind, params=SCHEDULES[kind])
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [weights[0]], "lr_scale": 0.1}, {"params": [weights[1]]}]
    optimizer = torch.optim.AdamW(groups, lr=0.3)
    scheduler = build_scheduler(optimizer, section, 20)
    wanted = learning_rates(section, 0.3, 20, list(range(20)))
    for step in range(20):
        scaled, plain = optimizer.param_groups
        assert (scheduler.learning_rate, plain["lr"], scaled["lr"]) == (wanted[step], wanted[step], wanted[step] * 0.1)
        assert scaled["betas"] == plain["betas"]
        scheduler.step()


def test_where_no_rule_says_otherwise_the_parameters_without_decay_are_those_of_transformers_trainer(
    tmp_path: Path,
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration, Trainer

    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    models: list[Any] = [
        LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=8)),
        T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=8, d_ff=8, d_kv=4, num_layers=2, num_heads=2)),
        Net(6, TinyModel()),
    ]
    config = configuration(tmp_path, rules=[])
    for model in models:
        theirs = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]  # it uses no self
        assert {t.names[0] for t in treatments(model, config) if t.weight_decay} == {
            name for name, _ in model.named_parameters() if name in theirs
        }


def test_norms_without_a_telling_name_have_no_decay_either(tmp_path: Path) -> None:
    class ScaleNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(2))

    layers = [nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.GroupNorm(1, 2), nn.RMSNorm(2), ScaleNorm()]
    found = treatments(nn.Sequential(*layers), configuration(tmp_path, rules=[]))
    assert [t.names[0] for t in found if t.weight_decay] == ["0.weight"]


def test_one_rule_with_the_optimizers_decay_gives_every_parameter_what_it_had_before(tmp_path: Path) -> None:
    config = configuration(tmp_path, rules=[{"names": ["*"], "weight_decay": 0.1}])
    (group,) = parameter_groups(Net(6, TinyModel()), config)
    assert (len(group["params"]), group["weight_decay"]) == (12, 0.1)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(4, 3), nn.Linear(3, 3), nn.Linear(3, 4, bias=False)
        self.head.weight = self.table.weight


def test_the_plan_counts_each_rule_and_names_tied_parameters(tmp_path: Path) -> None:
    config = configuration(tmp_path, rules=[{"names": ["head.*"], "frozen": True}, {"names": ["b*"], "lr_scale": 0.5}])
    rows = planned_rules(freeze(Tied(), config), config, 0.02)
    keys = ("rule", "trained", "tensors", "elements", "weight_decay", "learning_rate")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        ("head.*", False, 1, 12, None, None),  # by its other name
        ("b*", True, 1, 9, 0.1, 0.01),
        ("b*", True, 1, 3, 0.0, 0.01),
    ]
    task = TinyTask(config.data, config.model)
    task.build_model = Tied  # type: ignore[method-assign]
    summary = render_summary(make_plan(task, config, 1, freeze(Tied(), config)))
    assert "parameters  head.*: 1 weights of 12 elements, frozen" in summary
    assert "parameters  b*: 1 norms and biases of 3 elements, weight decay 0, lr 0.01" in summary
    assert "24 parameters, 12 of them trained, 12 frozen\n" in summary
    assert "tied        table.weight = head.weight, frozen" in summary


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            [{"names": ["block.0.*"]}],
            r"^training.parameters\[0\].names: 'block.0.\*' matches no.*: blocks.0.\*",
        ),
        ([{"names": ["*"]}, {"names": ["enter.*"]}], r"parameters\[1\]: rules before it have taken all"),
        ([{"names": ["*"], "frozen": True}], "every parameter is frozen"),
    ],
)
def test_a_rule_that_does_nothing_is_an_error(tmp_path: Path, rules: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        freeze(Net(6, TinyModel()), configuration(tmp_path, rules=rules))


def test_what_is_frozen_has_no_rate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training.parameters.*frozen has neither weight_decay nor lr_scale"):
        configuration(tmp_path, rules=[{"names": ["*"], "frozen": True, "lr_scale": 0.5}])


FROZEN: list[dict[str, Any]] = [{"names": ["blocks.*"], "frozen": True}]


def thawed_by_hand(config: RunConfig, at: int) -> dict[str, torch.Tensor]:
    """The blocks stand still for `at` steps and then begin with an optimizer of their own."""
    task = TinyTask(config.data, config.model)
    seed_torch(config.training.seed, 0)
    model = task.build_model()
    params, steps = config.deepspeed.optimizer.params, int(config.training.steps or 0)
    rates = learning_rates(config.deepspeed.scheduler, params["lr"], steps, list(range(steps)))
    blocks = {p for name, p in model.named_parameters() if name.startswith("blocks.")}
    spared = {p for name, p in model.named_parameters() if name.endswith("bias") or ".norm." in name}

    def optimizer(mine: set[nn.Parameter]) -> torch.optim.Optimizer:
        parts = [[p for p in model.parameters() if p in mine and (p in spared) is s] for s in (False, True)]
        return torch.optim.AdamW([{"params": p, "weight_decay": d} for p, d in zip(parts, (0.1, 0.0), strict=True)])

    optimizers = [optimizer(set(model.parameters()) - blocks), optimizer(blocks)]
    rows = task.dataset("train")
    batches = GlobalBatches(len(rows), config.deepspeed.train_batch_size or 0, config.training.seed)
    for step in range(steps):
        for block in blocks:
            block.requires_grad_(step >= at)
        chosen = [index for index in batches.samples(step) if index != FILLER]
        points, targets = (torch.cat([rows[index][part] for index in chosen]) for part in (0, 1))
        model.zero_grad()
        (model(points) - targets).square().mean().backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        for each in optimizers[: 1 + (step >= at)]:
            for group in each.param_groups:
                group["lr"] = rates[step]
            each.step()
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("before", "after"),
    [(("deepspeed", 1), ("deepspeed", 3)), (("deepspeed", 3), ("fsdp", 3)), (("fsdp", 3), ("deepspeed", 2))],
)
def test_frozen_then_thawed_begins_afresh_and_stays_apart_in_later_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], before: tuple[str, int], after: tuple[str, int]
) -> None:
    """12 steps: frozen to step 4, thawed on another layout, then resumed on the first one at step 8."""
    run = tmp_path / "run"
    for steps, (backend, stage), rules in ((4, before, FROZEN), (8, after, []), (12, before, [])):
        config = configuration(tmp_path / str(steps), stage, rules, save_every=4)
        trainer = Trainer(
            TinyTask(config.data, config.model), config, start(), run, backend=backend,
            resume="none" if steps == 4 else "auto",
        )  # fmt: skip
        stop_at(trainer, steps)
    said = [line for line in capsys.readouterr().out.splitlines() if "begins afresh" in line]
    assert said == [
        "note: 8 parameters of 176 elements are trained that were not before this checkpoint: "
        "their optimizer state begins afresh"
    ]
    assert_equal(
        load_file(run / "final" / "model.safetensors"), thawed_by_hand(configuration(tmp_path, rules=[]), at=4)
    )


def stop_at(trainer: Trainer, step: int) -> None:
    """Run until the checkpoint of `step` is written, or to the end."""
    save = trainer.save

    def save_and_leave(in_background: bool | None = None) -> Any:
        path = save(False)
        if trainer.progress.step == step < trainer.total_steps:
            raise LeftError
        return path

    trainer.save = save_and_leave  # type: ignore[method-assign]
    with contextlib.suppress(LeftError):
        trainer.run()


class LeftError(Exception):
    pass


def test_parameters_that_are_frozen_by_a_resume_lose_their_state_and_stand_still(tmp_path: Path) -> None:
    config = configuration(tmp_path, 0, [], save_every=4)
    stop_at(Trainer(TinyTask(config.data, config.model), config, start(), tmp_path / "run"), 4)
    frozen = configuration(tmp_path, 2, FROZEN, save_every=4)
    trainer = Trainer(TinyTask(config.data, config.model), frozen, start(), tmp_path / "run", resume="auto")
    held = {name: tensor for name, tensor in trainer.backend.full_state() if name.startswith("blocks.")}
    trainer.run()
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert held
    assert all(torch.equal(final[name], tensor) for name, tensor in held.items())


@pytest.mark.parametrize(
    ("backend", "bf16", "stage"),
    [*(("deepspeed", True, stage) for stage in (0, 1, 3)), ("deepspeed", False, 1), ("fsdp", True, 1)],
)
def test_frozen_parameters_stay_as_they_are_or_it_is_said(tmp_path: Path, backend: str, bf16: bool, stage: int) -> None:
    section = {"bf16": {"enabled": bf16}, "zero_optimization": {"stage": stage}}
    config = tiny_config(tmp_path, training={"parameters": FROZEN}, deepspeed=section)
    trainer = Trainer(TinyTask(config.data, config.model), config, start(), tmp_path / "run", backend=backend)
    seed_torch(config.training.seed, 0)
    built = TinyTask(config.data, config.model).build_model().state_dict()
    held = {name: tensor for name, tensor in trainer.backend.full_state() if name.startswith("blocks.")}
    changed = sum(tensor.numel() for name, tensor in held.items() if not torch.equal(tensor.float(), built[name]))
    assert changed == (144 if backend == "deepspeed" and bf16 else 0)  # not the norms, whose ones are as narrow
    said = f"{changed} values lose precision, in checkpoints too. --backend fsdp keeps them"
    assert [said in note for note in trainer.assembly.notes] == [True] * bool(changed)


def test_a_run_that_began_with_decay_everywhere_is_told_how_to_keep_it(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    model = TinyTask(config.data, config.model).build_model()
    (note,) = notes_of_earlier_version(model, configuration(tmp_path, rules=[]))
    assert '{"names": ["*"], "weight_decay": 0.1} keeps it so' in note
    assert notes_of_earlier_version(model, configuration(tmp_path, rules=[{"names": ["*"], "weight_decay": 0.1}])) == []
