"""The contracts of the engine, on the tiny task: splits, order, backends, resume, early stopping, broken gradients."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import run_distributed_test
from tests.engine.tiny import Net, TinyTask, tiny_config
from trunkline.engine.checkpoint.weights import load_weights
from trunkline.engine.config.deepspeed_section import batch_sizes
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.data.order import FILLER, GlobalBatches
from trunkline.engine.data.randomness import seed_torch
from trunkline.engine.errors import CheckpointError, ConfigError, TrunklineError
from trunkline.engine.machine import stopping
from trunkline.engine.machine.stopping import InterruptedRunError
from trunkline.engine.optim.schedules import learning_rates
from trunkline.engine.ranks import lookout
from trunkline.engine.ranks.distributed import start
from trunkline.engine.state.sharded_state import Snapshot
from trunkline.engine.task import Batch, Sums
from trunkline.engine.trainer import Trainer

SLOW = pytest.mark.slow


def train(folder: Path, config: RunConfig, resume: str = "none") -> Trainer:
    trainer = Trainer(TinyTask(config.data, config.model), config, start(), folder, resume=resume)
    trainer.run()
    return trainer


def lines(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    untimed = [{key: value for key, value in row.items() if key not in ("time", "seconds")} for row in rows]
    return [row for row in untimed if row["split"] == split]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in lines(folder)]


def seen(row: dict[str, Any]) -> list[float]:
    return [row[key] for key in ("step", "epoch", "samples_seen", "points_seen")]


def reference_losses(config: RunConfig) -> list[float]:
    """The same run as a plain loop over whole global batches: torch alone, no engine, no DeepSpeed."""
    task = TinyTask(config.data, config.model)
    seed_torch(config.training.seed, 0)
    model = task.build_model()
    params = config.deepspeed.optimizer.params
    optimizer = torch.optim.AdamW(without_decay_on_norms_and_biases(model), **params)
    steps = config.training.steps or 0
    rates = learning_rates(config.deepspeed.scheduler, params["lr"], steps, list(range(steps)))
    rows = task.dataset("train")
    batches = GlobalBatches(len(rows), config.deepspeed.train_batch_size or 0, config.training.seed)  # type: ignore[arg-type]
    out = []
    for step in range(steps):
        chosen = [index for index in batches.samples(step) if index != FILLER]
        points = torch.cat([rows[index][0] for index in chosen])
        targets = torch.cat([rows[index][1] for index in chosen])
        loss = (model(points) - targets).square().mean()
        out.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.deepspeed.gradient_clipping)
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        optimizer.step()
    return out


def without_decay_on_norms_and_biases(model: torch.nn.Module) -> list[dict[str, Any]]:
    spared = [p for name, p in model.named_parameters() if name.endswith("bias") or ".norm." in name]
    others = [p for name, p in model.named_parameters() if not (name.endswith("bias") or ".norm." in name)]
    return [{"params": others}, {"params": spared, "weight_decay": 0.0}]


@pytest.mark.parametrize(
    ("stage", "micro"),
    [(0, 8), (1, 2), (2, 1), (3, 2), *(pytest.param(stage, micro, marks=SLOW) for stage, micro in [(0, 1), (2, 8)])],
)
def test_any_zero_stage_and_split_follows_a_plain_torch_loop(tmp_path: Path, stage: int, micro: int) -> None:
    section = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": micro}
    config = tiny_config(tmp_path, deepspeed=section)
    train(tmp_path / "run", config)
    assert losses(tmp_path / "run") == pytest.approx(reference_losses(config), rel=1e-5)


def train_stages_on_a_rank(rank: int, world_size: int, folder: Path) -> None:
    for stage in range(4):
        section = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 1}
        config = tiny_config(folder / f"{stage}-{rank}", data={"noise": 0.1}, deepspeed=section)
        train(folder / str(stage), config)


@pytest.mark.distributed
def test_two_ranks_give_the_losses_of_one_at_every_zero_stage(tmp_path: Path) -> None:
    """Ragged batches, a short last batch, and noise that belongs to the sample: 40 samples by 16 leave 8."""
    one = tiny_config(tmp_path, data={"noise": 0.1})
    train(tmp_path / "one", one)
    run_distributed_test(train_stages_on_a_rank, 2, tmp_path, backend=None)
    for stage in range(4):
        assert losses(tmp_path / str(stage)) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
        assert [seen(row) for row in lines(tmp_path / str(stage))] == [seen(row) for row in lines(tmp_path / "one")]
        val = [row["loss"] for row in lines(tmp_path / "one", "val")]
        assert [row["loss"] for row in lines(tmp_path / str(stage), "val")] == pytest.approx(val, rel=1e-5)


def test_a_task_can_tell_evaluation_from_training_by_the_model_that_it_is_given(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Watching(TinyTask):
        def loss(self, model: torch.nn.Module, batch: Batch) -> Sums:
            seen.append(model.training)
            return super().loss(model, batch)

    config = tiny_config(tmp_path, training={"steps": 2, "eval_every": 1, "save_every": 9})
    Trainer(Watching(config.data, config.model), config, start(), tmp_path / "run").run()
    step, evaluation, probe = [True] * 4, [False] * 6, [False]  # 8 samples by 2, 11 by 2
    plan, first_look = [True], [False]
    assert seen == plan + first_look + step + evaluation + step + evaluation + probe


def test_every_validation_sample_counts_once(tmp_path: Path) -> None:
    train(tmp_path / "run", tiny_config(tmp_path))  # 11 samples in micro-batches of 2
    assert [row["samples"] for row in lines(tmp_path / "run", "val")] == [11, 11, 11]


def test_the_logged_rate_is_the_planned_one(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    train(tmp_path / "run", config)
    assert config.deepspeed.scheduler
    planned = learning_rates(config.deepspeed.scheduler, 0.01, 12, list(range(12)))
    assert [row["lr"] for row in lines(tmp_path / "run")] == pytest.approx(list(planned.values()))


def interrupted_then_resumed(folder: Path, config: RunConfig, at: int) -> Trainer:
    trainer = Trainer(TinyTask(config.data, config.model), config, start(), folder)
    step = trainer.backend.step

    def step_then_signal() -> Any:
        if trainer.progress.step + 1 == at:
            os.kill(os.getpid(), signal.SIGTERM)
            while stopping.requested() is None:  # a thread hears it, when the machine lets it
                time.sleep(0.001)
        return step()

    trainer.backend.step = step_then_signal  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookout, "EVERY_MS", 0)
        with pytest.raises(InterruptedRunError, match=rf"by SIGTERM after step {at}, which is saved; .*--resume auto"):
            trainer.run()  # in the evaluation of that step
    return train(folder, config, resume="auto")


@pytest.mark.parametrize("stage", [pytest.param(0, marks=SLOW), 2, 3])
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(
    tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, noise, ragged batches, early stopping and a best metric to remember."""
    monkeypatch.setattr(lookout, "EVERY_MS", 0)
    config = tiny_config(
        tmp_path,
        data={"noise": 0.2},
        model={"dropout": 0.3},
        training={"eval_every": 2, "early_stopping": {"patience": 9}},
        deepspeed={"zero_optimization": {"stage": stage}},
    )
    whole = train(tmp_path / "whole", config)
    resumed = interrupted_then_resumed(tmp_path / "resumed", config, at=6)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")
    assert lines(tmp_path / "resumed", "val") == lines(tmp_path / "whole", "val")
    assert resumed.progress == whole.progress
    for name in ("best", "final"):
        one, two = (load_file(tmp_path / run / name / "model.safetensors") for run in ("whole", "resumed"))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)


class Renamed(TinyTask):
    """Leaves the buffer out of files of weights and gives the parameters a prefix."""

    def tensor_name(self, name: str) -> str | None:
        return None if name == "offset" else f"net.{name}"


def test_weights_carry_the_names_that_the_task_gives_and_config_json_what_it_adds(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, training={"steps": 2})
    trainer = Trainer(Renamed(config.data, config.model), config, start(), tmp_path / "run")
    trainer.run()
    saved = load_file(tmp_path / "run/final/model.safetensors")
    held = {f"net.{name}": value for name, value in trainer.backend.module.named_parameters()}
    assert saved.keys() == held.keys()
    assert all(torch.equal(saved[name], held[name]) for name in saved)
    found = json.loads((tmp_path / "run/final/config.json").read_text())
    added = {"model_type": "tiny", "dtype": "float32", "data_fingerprint": trainer.task.fingerprint()}
    assert found == added | trainer.config.as_dict()


def test_early_stopping_counts_and_stops(tmp_path: Path) -> None:
    stop = {"eval_every": 1, "early_stopping": {"patience": 3, "min_delta": 100.0}, "steps": 50, "log_every": 3}
    trainer = train(tmp_path / "run", tiny_config(tmp_path, training=stop))
    assert trainer.progress.step == 4  # the first evaluation is a gain, the next three are not
    assert len(lines(tmp_path / "run", "val")) == 4
    assert [row["step"] for row in lines(tmp_path / "run")] == [3, 4]
    assert (tmp_path / "run/checkpoints/step-00000004").is_dir()


def test_best_holds_the_weights_of_the_best_evaluation(tmp_path: Path) -> None:
    # a rate far too high, so that the last weights are not the best ones
    config = tiny_config(
        tmp_path,
        training={"eval_every": 1},
        deepspeed={
            "optimizer": {"type": "SGD", "params": {"lr": 3.0}},
            "scheduler": {"type": "Constant", "params": {}},
        },
    )
    trainer = train(tmp_path / "run", config)
    val = [row["loss"] for row in lines(tmp_path / "run", "val")]
    assert val[-1] > min(val)
    model = Net(config.data.width, config.model)
    facts = load_weights(model, tmp_path / "run/best")
    assert facts == {"step": 1 + int(np.argmin(val)), "loss": min(val)}
    task = trainer.task
    batch = task.collate([task.dataset("val")[i] for i in range(11)]) | {"valid": torch.ones(11, dtype=torch.bool)}
    with torch.no_grad():
        sums = task.evaluate(model.eval(), batch)
    assert task.summarize(sums)["loss"] == pytest.approx(min(val), rel=1e-5)


@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=SLOW) for stage in (1, 2)), 3])
def test_a_step_without_finite_gradient_is_skipped_counted_and_named(
    tmp_path: Path, stage: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(
        tmp_path, data={"poison": [3]}, training={"steps": 5}, deepspeed={"zero_optimization": {"stage": stage}}
    )
    batches = GlobalBatches(40, 8, config.training.seed)
    bad = next(step for step in range(5) if 3 in batches.samples(step))
    trainer = train(tmp_path / "run", config)
    assert trainer.progress.skipped_steps == 1
    assert [row["step"] for row in lines(tmp_path / "run", "skipped")] == [bad + 1]
    said = capsys.readouterr().out
    assert f"step {bad + 1} skipped" in said
    assert "rank 0: loss nan in micro-batch" in said
    model = Net(config.data.width, config.model)
    load_weights(model, tmp_path / "run/final")
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def train_poisoned(rank: int, world_size: int, folder: Path) -> list[str]:
    said = []
    for backend, stage in [*(("deepspeed", stage) for stage in range(4)), *(("fsdp", stage) for stage in (0, 3))]:
        config = tiny_config(
            folder / f"{backend}{stage}-{rank}", data={"poison": [3]}, training={"steps": 5},
            deepspeed={"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 1},
        )  # fmt: skip
        task, lines = TinyTask(config.data, config.model), io.StringIO()
        trainer = Trainer(task, config, start(), folder / f"{backend}{stage}", backend=backend)
        with contextlib.redirect_stdout(lines):
            assert trainer.run().skipped_steps == 1
        said.append(lines.getvalue())
    return said


@pytest.mark.distributed
def test_on_two_ranks_the_rank_of_a_broken_gradient_is_named(tmp_path: Path) -> None:
    said, _ = run_distributed_test(train_poisoned, 2, tmp_path, backend=None)
    order = GlobalBatches(40, 8, 42)
    place = next(list(order.samples(step)).index(3) for step in range(5) if 3 in order.samples(step))
    micro_batch, rank = divmod(place, 2)
    assert len(said) == 6
    for lines in said:
        assert f"(rank {rank}: loss nan in micro-batch {micro_batch})" in lines


class SquareRootTask(TinyTask):
    """Its loss is finite, but the gradient of one parameter is not: the square root at zero."""

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        net = getattr(model, "module", model)
        kink = (net.enter.bias - net.enter.bias.detach()).square().sum().sqrt()
        sums = super().loss(model, batch)
        return sums | {"loss": sums["loss"] + kink}


def test_the_first_parameter_with_a_broken_gradient_is_named_and_the_run_stops_after_n(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, training={"nonfinite_limit": 3})
    trainer = Trainer(SquareRootTask(config.data, config.model), config, start(), tmp_path / "run")
    with pytest.raises(TrunklineError, match=r"rank 0: gradient of enter.bias in micro-batch 0.*3 in a row.*lower"):
        trainer.run()
    assert trainer.progress.step == 3


def test_a_run_never_starts_from_zero_over_checkpoints_of_another(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    train(tmp_path / "run", config)
    with pytest.raises(ConfigError, match=r"holds checkpoints.* of an earlier run; resume with --resume auto"):
        train(tmp_path / "run", config)


@pytest.mark.fault("another {named}")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"training": {"seed": 7}}, "seed"),
        ({"model": {"hidden": 16}}, "model"),
        ({"data": {"samples": 39}}, "other data than this run has; --accept-new-data takes the data set as it is now"),
        ({"deepspeed": {"train_batch_size": 4}}, "global_batch_size"),
    ],
)
def test_a_run_that_differs_is_not_resumed(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    train(tmp_path / "run", tiny_config(tmp_path, training={"steps": 4}))
    with pytest.raises(CheckpointError, match=f"was written with {named}"):
        train(tmp_path / "run", tiny_config(tmp_path, **change), resume="auto")


@pytest.mark.fault("another data set, accepted")
def test_a_run_goes_on_with_a_changed_data_set_where_that_is_wanted(tmp_path: Path) -> None:
    train(tmp_path / "run", tiny_config(tmp_path, training={"steps": 4}))
    config = tiny_config(tmp_path, data={"samples": 39, "longest": 4})  # other validation samples too
    with pytest.raises(CheckpointError, match="--accept-new-data takes the data set as it is now"):
        train(tmp_path / "run", config, resume="auto")
    task = TinyTask(config.data, config.model)
    trainer = Trainer(task, config, start(), tmp_path / "run", resume="auto", accept_new_data=True)
    assert trainer.run().step == 12


def test_a_run_whose_code_gives_another_loss_is_not_resumed(tmp_path: Path) -> None:
    train(tmp_path / "run", tiny_config(tmp_path, training={"steps": 4}))
    config = tiny_config(tmp_path)

    class Changed(TinyTask):
        def loss(self, model: torch.nn.Module, batch: Batch) -> Sums:
            return {key: 2 * value for key, value in super().loss(model, batch).items()}

    with pytest.raises(CheckpointError, match=r"the loss of the probe sample was .* when it was saved and is"):
        Trainer(Changed(config.data, config.model), config, start(), tmp_path / "run", resume="auto")


def test_an_error_after_a_save_began_does_not_lose_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Snapshot.write

    def slowly(snapshot: Snapshot, folder: Path, rank: int, world_size: int) -> dict[str, int]:
        time.sleep(0.5)
        return write(snapshot, folder, rank, world_size)

    monkeypatch.setattr(Snapshot, "write", slowly)
    bad_sample = int(GlobalBatches(40, 8, 42).samples(2)[0])
    config = tiny_config(tmp_path, training={"save_every": 2, "nonfinite_limit": 1}, data={"poison": [bad_sample]})
    with pytest.raises(TrunklineError, match="nonfinite_limit"):
        train(tmp_path / "run", config)
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-00000002"]


def test_a_resumed_run_follows_its_own_learning_rate(tmp_path: Path) -> None:
    train(tmp_path / "run", tiny_config(tmp_path, training={"steps": 4}))
    slower = {"optimizer": {"type": "AdamW", "params": {"lr": 0.001, "weight_decay": 0.01}}}
    config = tiny_config(tmp_path, deepspeed=slower)
    train(tmp_path / "run", config, resume="auto")
    rates = learning_rates(config.deepspeed.scheduler, 0.001, 12, list(range(12)))
    found = {row["step"]: row["lr"] for row in lines(tmp_path / "run")}
    assert [found[step + 1] for step in range(4, 12)] == pytest.approx([rates[step] for step in range(4, 12)])


def test_a_longer_run_goes_on_from_a_path(tmp_path: Path) -> None:
    train(tmp_path / "short", tiny_config(tmp_path, training={"steps": 4}))
    trainer = train(tmp_path / "long", tiny_config(tmp_path), resume=str(tmp_path / "short"))
    assert trainer.progress.step == 12
    assert [row["step"] for row in lines(tmp_path / "long")] == list(range(5, 13))


@pytest.mark.parametrize("name", ["x" * 5000, "x\0y"])
def test_a_place_to_resume_from_that_cannot_be_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r'--resume "x.*: cannot be read'):
        train(tmp_path / "run", tiny_config(tmp_path), resume=name)


def test_asking_to_resume_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: there is no checkpoint in it"):
        train(tmp_path / "run", tiny_config(tmp_path), resume=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(("option", "value"), [("activation_checkpointing", True), ("num_workers", 2)])
def test_options_that_cost_or_save_time_leave_the_losses_alone(tmp_path: Path, option: str, value: Any) -> None:
    train(tmp_path / "plain", tiny_config(tmp_path))
    train(tmp_path / "option", tiny_config(tmp_path, training={option: value}))
    assert losses(tmp_path / "option") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_offloaded_optimizer_states_give_the_same_losses(tmp_path: Path) -> None:
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    config = tiny_config(tmp_path, deepspeed=offload)
    train(tmp_path / "run", config)
    assert losses(tmp_path / "run") == pytest.approx(reference_losses(config), rel=1e-5)


@pytest.mark.parametrize(
    ("section", "world", "message"),
    [
        (
            {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4},
            2,
            r"10 is not a multiple of 8 \(.* 4 x 2 ranks\): use 1 for",
        ),
        ({"train_batch_size": 3, "train_micro_batch_size_per_gpu": "auto"}, 2, "cannot be shared by 2 ranks"),
        ({"train_batch_size": 8, "gradient_accumulation_steps": 3}, 2, "contradicts train_batch_size 8"),
    ],
)
def test_batch_sizes_that_do_not_multiply_are_named(
    tmp_path: Path, section: dict[str, Any], world: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        batch_sizes(tiny_config(tmp_path, deepspeed=section).deepspeed, world)


def launch_by_deepspeed(*script: str | Path) -> str:
    """What two ranks print that DeepSpeed's launcher starts."""
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [launcher, "--num_gpus", "2", "--master_port", str(29500 + os.getpid() % 1000), *script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | {"PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_deepspeed_launcher_says_to_each_rank_who_it_is(tmp_path: Path) -> None:
    script = tmp_path / "who.py"
    script.write_text(
        "import sys\nfrom trunkline.engine.ranks.launch import read_launch\nlaunch = read_launch()\n"
        "line = ' '.join(map(str, ('rank', launch.rank, 'of', launch.world_size, launch.local_rank, *sys.argv[1:])))\n"
        "sys.stdout.write(line + '\\n')\n"  # at once: print would write word by word, between the other rank's
    )
    said = launch_by_deepspeed(script, "out")
    for rank in (0, 1):
        assert f"rank {rank} of 2 {rank} --local_rank={rank} out\n" in said


@pytest.mark.slow
def test_the_deepspeed_launcher_drives_two_ranks_to_the_same_losses(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, deepspeed={"zero_optimization": {"stage": 2}})
    train(tmp_path / "one", config)
    assert config.source
    launch_by_deepspeed("tests/engine/tiny.py", tmp_path / "two", config.source)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert not math.isnan(losses(tmp_path / "two")[-1])
