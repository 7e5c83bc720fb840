"""The weights' moving average: through resumes on other layouts, in bf16, and where it stands for the weights.

That it is a plain loop's on every layout is tested beside the rules for parameters, in the same runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import run_distributed_test
from tests.engine.optim.test_parameter_rules import EMA, assert_as_a_plain_loop, configuration, stop_at, train
from tests.engine.test_trainer import interrupted_then_resumed
from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.checkpoint.export import export_weights
from trunkline.engine.checkpoint.manifest import verify
from trunkline.engine.errors import ConfigError
from trunkline.engine.plan import make_plan
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer


def begin(folder: Path, config: Any, backend: str = "deepspeed", resume: str = "none") -> Trainer:
    return Trainer(TinyTask(config.data, config.model), config, start(), folder, backend=backend, resume=resume)


@pytest.mark.parametrize(
    ("before", "after"),
    [(("deepspeed", 0), ("fsdp", 3)), (("deepspeed", 3), ("deepspeed", 1)), (("fsdp", 2), ("deepspeed", 3))],
)
def test_an_average_is_resumed_on_another_layout(
    tmp_path: Path, before: tuple[str, int], after: tuple[str, int]
) -> None:
    stop_at(begin(tmp_path / "run", configuration(tmp_path / "a", before[1], save_every=5), before[0]), 5)
    config = configuration(tmp_path / "b", after[1], save_every=5)
    train(tmp_path / "run", config, after[0], resume="auto")
    assert_as_a_plain_loop(tmp_path / "run", config)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_that_is_stopped_in_an_evaluation_of_its_average_equals_the_unbroken_one(
    tmp_path: Path, stage: int
) -> None:
    config = configuration(tmp_path, stage, eval_every=5)
    train(tmp_path / "unbroken", config)
    interrupted_then_resumed(tmp_path / "run", config, at=5)
    for name in ("final", "best"):
        wanted, found = (load_file(tmp_path / run / name / "model.safetensors") for run in ("unbroken", "run"))
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_run_that_kept_no_average_begins_one_with_the_weights_that_it_resumes(tmp_path: Path) -> None:
    stop_at(begin(tmp_path / "run", configuration(tmp_path / "a", save_every=5, ema=None)), 5)
    trainer = begin(tmp_path / "run", configuration(tmp_path / "b"), resume="auto")
    for owner, average in trainer.assembly.average.of.items():
        assert torch.equal(owner.detach(), average)
    assert trainer.progress.averaged == 0


def test_a_run_that_wants_no_average_resumes_from_one_that_kept_it(tmp_path: Path) -> None:
    stop_at(begin(tmp_path / "run", configuration(tmp_path / "a", save_every=5)), 5)
    train(tmp_path / "run", configuration(tmp_path / "b", ema=None), resume="auto")
    train(tmp_path / "plain", configuration(tmp_path / "c", ema=None))
    last = [load_file(tmp_path / run / "final" / "model.safetensors") for run in ("run", "plain")]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[1])


@pytest.mark.parametrize(("backend", "stage"), [("deepspeed", 0), ("deepspeed", 2), ("deepspeed", 3), ("fsdp", 3)])
def test_a_run_in_bf16_averages_the_fp32_masters_and_evaluates_with_them(
    tmp_path: Path, backend: str, stage: int
) -> None:
    """The average of masters after each step, in fp64. Evaluating with it changes nothing of the training."""

    def section(name: str, **training: Any) -> Any:
        return tiny_config(
            tmp_path / name, training={"steps": 6, "eval_every": 2, "save_every": 99} | training,
            deepspeed={"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}},
        )  # fmt: skip

    trainer = begin(tmp_path / "run", section("run", ema={"decay": 0.7, "warmup": False}), backend)
    wanted = {name: tensor.double() for name, tensor in trainer.backend.full_state()}
    masters = []
    step = trainer.backend.step

    def step_and_look() -> Any:
        done = step()
        masters.append(dict(trainer.backend.full_state()))
        for name, tensor in masters[-1].items():
            wanted[name] += 0.3 * (tensor.double() - wanted[name])
        return done

    trainer.backend.step = step_and_look  # type: ignore[method-assign]
    trainer.run()
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    for name, tensor in final.items():
        if name != "offset":
            torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-6, atol=1e-7)
    plain = begin(tmp_path / "plain", section("plain"), backend)
    plain.run()
    for name, tensor in plain.backend.full_state():
        assert torch.equal(tensor, masters[-1][name])


def test_best_is_made_again_from_the_average_in_a_checkpoint(tmp_path: Path) -> None:
    config = configuration(tmp_path, eval_every=4, save_every=4)
    stop_at(begin(tmp_path / "run", config), 4)
    best = tmp_path / "run" / "best" / "model.safetensors"
    wanted = load_file(best)
    best.unlink()
    begin(tmp_path / "run", config, resume="auto").trackers.close()
    found = load_file(best)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_an_export_gives_the_weights_or_their_average(tmp_path: Path) -> None:
    train(tmp_path / "run", configuration(tmp_path, save_every=12))
    found = verify(tmp_path / "run" / "checkpoints" / "step-00000012")
    for average, folder in ((False, "final"), (True, "best")):
        export_weights(found, tmp_path / folder, 1 << 30, average=average)
        exported = load_file(tmp_path / folder / "model.safetensors")
        wanted = load_file(tmp_path / "run" / folder / "model.safetensors")
        assert all(torch.equal(exported[name], wanted[name]) for name in wanted)


def test_the_plan_shows_the_memory_of_an_average(tmp_path: Path) -> None:
    def memory(stage: int, ranks: int, **training: Any) -> dict[str, Any]:
        config = configuration(tmp_path, stage, [], **training)
        task = TinyTask(config.data, config.model)
        return make_plan(task, config, ranks, task.build_model())["memory_bytes"]

    assert "average" not in memory(0, 2, ema=None)
    assert (memory(0, 2)["average"], memory(1, 2)["average"]) == (4 * 241, 2 * 241)


def test_a_use_that_is_not_known_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training.ema.use"):
        configuration(tmp_path, ema=EMA | {"use": ["best"]})


def averaged_elements(rank: int, world_size: int, folder: Path, stage: int) -> int:
    trainer = begin(folder / f"run-{stage}", configuration(folder / f"{rank}-{stage}", stage))
    assert trainer.assembly.average.of
    return sum(average.numel() for average in trainer.assembly.average.of.values())


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 2])
def test_ranks_share_the_average_as_they_share_the_optimizers_state(tmp_path: Path, stage: int) -> None:
    config = configuration(tmp_path)
    trained = TinyTask(config.data, config.model).build_model()
    whole = sum(p.numel() for name, p in trained.named_parameters() if name != "enter.weight")
    found = run_distributed_test(averaged_elements, 2, tmp_path, stage, backend=None)
    assert whole <= sum(found) < 1.5 * whole
