"""Optimizers and schedules of a user's own: named as "module:Class", typed, tried, and trained with."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.config.deepspeed_section import own_classes
from trunkline.engine.config.own_class import own_class
from trunkline.engine.errors import ConfigError
from trunkline.engine.optim.optimizer_probe import check_optimizer
from trunkline.engine.ranks.distributed import start
from trunkline.engine.ranks.start_facts import class_version, digest
from trunkline.engine.trainer import Trainer

SOURCE = '''
import torch
from torch.optim.lr_scheduler import LRScheduler


class Lion(torch.optim.Optimizer):
    """Chen et al., arXiv:2302.06675."""

    def __init__(self, params, lr, betas=(0.9, 0.99), weight_decay=0.0, inner=1, **others):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})
        self.inner = range(inner)  # which takes an integer only

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * torch.sign(state["exp_avg"] * beta1 + p.grad * (1 - beta1)))
                state["exp_avg"].mul_(beta2).add_(p.grad, alpha=1 - beta2)


class Rows(Lion):
    """Changes an element by others of its row."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.sub_(0.1 * p.grad / p.grad.norm())


class Forgetful(Lion):
    """Keeps what no checkpoint sees."""

    @torch.no_grad()
    def step(self, closure=None):
        self.count = getattr(self, "count", 0) + 1
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.sub_(0.1 * self.count * p.grad)


class Halving(LRScheduler):
    def __init__(self, optimizer, every, last_epoch=-1):
        self.every = every
        super().__init__(optimizer, last_epoch)

    def get_lr(self):
        return [lr * 0.5 ** (self.last_epoch // self.every) for lr in self.base_lrs]


class Unrelated:
    pass
'''


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package/optim.py").write_text(SOURCE)
    (tmp_path / "my_package/broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def section(kind: str = "my_package.optim:Lion", stage: int = 0, **params: Any) -> dict[str, Any]:
    return {
        "optimizer": {"type": kind, "params": {"lr": 0.01, **params}},
        "scheduler": {"type": "my_package.optim:Halving", "params": {"every": 4}},
        "zero_optimization": {"stage": stage},
    }


def refusal(folder: Path, **deepspeed: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        tiny_config(folder, deepspeed=deepspeed)
    return str(caught.value)


@pytest.mark.parametrize(("backend", "stage"), [("deepspeed", 3), pytest.param("fsdp", 3, marks=pytest.mark.slow)])
def test_a_run_trains_with_them_and_resumes_to_the_same_losses(tmp_path: Path, backend: str, stage: int) -> None:
    def train(name: str, steps: int, resume: str = "none") -> list[dict[str, Any]]:
        config = tiny_config(tmp_path, training={"steps": steps}, deepspeed=section(stage=stage, betas=[0.8, 0.9]))
        folder = tmp_path / name
        trainer = Trainer(
            TinyTask(config.data, config.model), config, start(), folder, backend=backend, resume=resume
        )  # fmt: skip
        trainer.run()
        assert type(trainer.backend.optimizer).__name__ == "Lion"
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if row["split"] == "train"]

    unbroken = train("unbroken", 12)
    assert [row["lr"] for row in unbroken] == [0.01 * 0.5 ** (step // 4) for step in range(12)]
    assert unbroken[-1]["loss"] < unbroken[0]["loss"]
    train("broken", 5)
    assert [row["loss"] for row in train("broken", 12, "auto")] == [row["loss"] for row in unbroken]


def test_parameters_are_typed_by_the_signature_of_the_class(tmp_path: Path) -> None:
    message = refusal(tmp_path, **section(betas=[0.9, 1.5], weight_decy=0.1, inner="many"))
    assert "optimizer.params.betas.1: " in message
    assert "unknown to my_package.optim:Lion; did you mean 'weight_decay'?" in message
    assert "optimizer.params.inner: " in message
    schedule = {"type": "my_package.optim:Halving", "params": {}}
    assert "scheduler.params.every: missing" in refusal(tmp_path, **section() | {"scheduler": schedule})
    kept = tiny_config(tmp_path, deepspeed=section(inner=2)).deepspeed.optimizer.params
    assert (kept["inner"], type(kept["inner"])) == (2, int)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my_packag.optim:Lion", r"the module 'my_packag\.optim' cannot be imported \(ModuleNotFoundError.*PYTHONPATH"),
        ("my_package.broken:Lion", r"cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("my_package.optim:Loin", r"the module 'my_package\.optim' has no class 'Loin'; did you mean 'Lion'\?"),
        ("my_package.optim:Unrelated", r"Unrelated of the module .* is no subclass of torch\.optim\.optimizer\.Opt"),
        ("my_package.optim:Halving", r"is no subclass of torch\.optim\.optimizer\.Optimizer"),
        (":Lion", r"the module '' cannot be imported"),
        ("my_package.optim:", r"has no class ''"),
    ],
)
def test_a_name_that_leads_nowhere_is_an_error_that_names_it(tmp_path: Path, name: str, said: str) -> None:
    config = section(name)
    with pytest.raises(ConfigError, match=r"deepspeed\.optimizer\.type: .*" + said):
        tiny_config(tmp_path, deepspeed=config)


@pytest.mark.parametrize(
    ("name", "backend", "stage", "said"),
    [
        ("Rows", "deepspeed", 1, "by what others of its parameter are, and ZeRO 1 splits parameters over ranks"),
        ("Forgetful", "deepspeed", 0, "keeps more than its state"),
        ("Rows", "fsdp", 3, "by what others of its parameter are, and FSDP splits parameters over ranks"),
    ],
)
def test_a_class_that_could_not_be_split_or_resumed_is_refused(
    tmp_path: Path, name: str, backend: str, stage: int, said: str
) -> None:
    config = tiny_config(tmp_path, deepspeed=section(f"my_package.optim:{name}", stage) | {"scheduler": None})
    with pytest.raises(ConfigError, match=said):
        check_optimizer(config.deepspeed, backend, 10, torch.device("cpu"))
    if name != "Forgetful":
        check_optimizer(config.deepspeed.model_copy(update={"zero_optimization": section_of_zero_0(tmp_path)}),
                        "deepspeed", 10, torch.device("cpu"))  # fmt: skip


def section_of_zero_0(folder: Path) -> Any:
    return tiny_config(folder).deepspeed.zero_optimization


def test_ranks_compare_the_code_of_the_classes(tmp_path: Path) -> None:
    classes = own_classes(tiny_config(tmp_path, deepspeed=section()).deepspeed)
    code = digest((tmp_path / "my_package/optim.py").read_bytes())
    assert class_version(*classes) == {"code of Lion": code, "code of Halving": code}
    assert own_classes(tiny_config(tmp_path).deepspeed) == []
    assert own_class("my_package.optim:Lion", torch.optim.Optimizer) is classes[0]
