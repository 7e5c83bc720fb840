"""launchers/train.py from the outside: a run on toy data, its plan, and what it says to mistakes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed_test
from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.plan import make_plan
from trunkline.launchers import evaluate, predict, train

ROOT = Path(__file__).parents[2]


def test_a_run_leaves_everything_that_was_promised(toy: Path) -> None:
    run = toy / "run"
    for name in ("config.json", "plan.json", "metrics.jsonl", "report/summary.md", "best/model.safetensors",
                 "best/config.json", "best/schema.json", "final/model.safetensors",
                 "checkpoints/step-00000006"):  # fmt: skip
        assert (run / name).exists(), name
    assert [path.name for path in run.rglob("*draft*")] == []


def test_a_run_goes_on_from_another_working_directory(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = ["--config", str(toy / "config.json"), "--output-dir", str(run), "--set", "training.save_every=1"]
    monkeypatch.chdir(toy)
    assert train.main([*flags, "--store", "store", "--set", "training.steps=1"]) == 0
    for recorded in (run / "config.json", run / "best/config.json", run / "assets/config.json"):
        assert json.loads(recorded.read_text())["data"]["store"] == str(toy / "store")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(json.loads((run / "config.json").read_text())))
    again = ["--config", "config.json", "--output-dir", "run", "--resume", "auto", "--set", "training.steps=2"]
    capsys.readouterr()
    assert train.main(again) == 0
    assert re.search(r"done: run holds best/ \(mse [\d.]+ at step \d\), final/ and report/summary.md\n",
                     capsys.readouterr().out)  # fmt: skip
    assert (
        evaluate.main(["--run", "run", "--split", "val", "--horizons", "1 minute", "--no-ridge", "--max-cases", "1"])
        == 0
    )
    assert re.search(r"weights: run/best \(mse [\d.]+, step \d\)\n", capsys.readouterr().out)


def test_the_plan_agrees_with_the_run(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--config", str(toy / "config.json"), "--plan=json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in (toy / "run/metrics.jsonl").read_text().splitlines()]
    rates = [row["lr"] for row in rows if row["split"] == "train"]
    assert plan["steps"] == len(rates) == 6
    assert plan["learning_rate"]["step 0"] == pytest.approx(rates[0])
    assert plan["learning_rate"]["step 1"] == pytest.approx(rates[1])
    assert plan["learning_rate"]["last (step 5)"] == pytest.approx(rates[5])
    files = (toy / "run/checkpoints/step-00000006/backend").glob("*.safetensors")
    assert plan["checkpoint_bytes"] == pytest.approx(sum(file.stat().st_size for file in files), rel=0.15)
    assert plan == json.loads((toy / "run/plan.json").read_text())


def test_a_run_is_done_although_its_report_cannot_be_written(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/report").write_text("a file in the way of the folder")
    flags = ["--config", str(toy / "config.json"), "--output-dir", str(tmp_path / "run"), "--set", "training.steps=1"]
    assert train.main(flags) == 0
    assert "final/ and no report (" in capsys.readouterr().out


@pytest.mark.fault("output {where}, in a folder whose name it cannot show")
@pytest.mark.slow
@pytest.mark.parametrize("where", ["2>&1 | head -1; exit ${PIPESTATUS[0]}", ">/dev/full 2>&1", ">&- 2>&-"])
def test_a_run_ends_well_wherever_its_output_goes(toy: Path, tmp_path: Path, where: str) -> None:
    folder = os.fsencode(tmp_path) + b"/\xc3\xa9-\xff"  # an accent, and a byte that is no UTF-8
    command = [sys.executable, "launchers/train.py", "--config", toy / "config.json", "--output-dir", folder]
    done = subprocess.run(
        ["bash", "-c", f'"$@" {where}', "bash", *command, "--set", "training.steps=2"],
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)},
        cwd=ROOT, timeout=240, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert (Path(os.fsdecode(folder)) / "report/summary.md").exists()
    assert b"Traceback" not in done.stdout + done.stderr


def test_the_micro_batch_is_looked_for_where_that_is_wanted(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config", str(toy / "config.json"), "--output-dir", str(tmp_path / "run"), "--find-micro-batch"]
    assert train.main([*flags, "--set", "deepspeed.train_micro_batch_size_per_gpu=2"]) == 0
    assert "training with micro-batches of 8, remembered in" in capsys.readouterr().out  # the CPU has room for all
    assert json.loads((tmp_path / "run/plan.json").read_text())["micro_batch_size"] == 8
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    whole = [json.loads(line) for line in (toy / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows if row["split"] == "train"] == [
        row["loss"] for row in whole if row["split"] == "train"
    ]


def test_the_plan_names_the_origin_of_every_value(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", str(toy / "config.json"), "--plan", "--set", "training.seed=5"]
    flags += ["--set", "deepspeed.train_batch_size=32", "--world-size", "2"]
    assert train.main(flags) == 0
    said = capsys.readouterr().out
    assert "27,809 parameters" in said
    lines = {line.split()[0]: line for line in said.splitlines() if line.endswith(")")}
    assert lines["training.seed"].split()[1:] == ["5", "(command", "line)"]
    assert lines["training.log_every"].split()[1:] == ["1", "(file)"]
    assert lines["training.keep_last"].endswith("(file)")
    assert lines["training.deterministic"].split()[1:] == ["False", "(default)"]
    assert "32 = 8 a micro-batch x 2 ranks x 2 accumulation steps" in said


def test_planned_activations_are_those_that_autograd_keeps(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, deepspeed={"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4})
    task = TinyTask(config.data, config.model)
    model = task.build_model()
    planned = make_plan(task, config, 1, model)["memory_bytes"]["activations"]
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = task.collate([task.dataset("train")[0]] * 4) | {"valid": torch.ones(4, dtype=torch.bool)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = task.loss(model, batch)["loss"]
    assert loss.requires_grad
    assert planned == sum(kept.values()) > 0


def test_activations_of_a_micro_batch_that_no_memory_holds_are_unknown(tmp_path: Path) -> None:
    size = {"train_batch_size": 10**18, "train_micro_batch_size_per_gpu": "auto"}
    config = tiny_config(tmp_path, deepspeed=size)
    task = TinyTask(config.data, config.model)
    plan = make_plan(task, config, 1, task.build_model(), samples=10**18)
    assert plan["memory_bytes"]["activations"] is None
    assert plan["steps_per_epoch"] == 1


def test_planned_states_shrink_with_the_zero_stage_and_the_ranks(tmp_path: Path) -> None:
    def memory(stage: int, ranks: int, bf16: bool) -> dict[str, int]:
        config = tiny_config(
            tmp_path,
            deepspeed={"train_batch_size": 8, "zero_optimization": {"stage": stage}, "bf16": {"enabled": bf16}},
        )
        task = TinyTask(config.data, config.model)
        return make_plan(task, config, ranks, task.build_model())["memory_bytes"]

    n = sum(parameter.numel() for parameter in TinyTask(*_sections(tmp_path)).build_model().parameters())
    assert memory(0, 4, bf16=True) | {"activations": 0} == {
        "parameters": 2 * n, "gradients": 2 * n, "master weights": 4 * n, "optimizer": pytest.approx(8 * n, rel=0.01),
        "activations": 0,
    }  # fmt: skip
    three = memory(3, 4, bf16=True)
    assert three["parameters"] == pytest.approx(2 * n / 4, abs=2)
    assert three["optimizer"] == pytest.approx(8 * n / 4, rel=0.01)
    assert memory(2, 4, bf16=False)["parameters"] == 4 * n


def _sections(folder: Path) -> tuple[Any, Any]:
    config = tiny_config(folder)
    return config.data, config.model


def test_every_shipped_configuration_is_valid() -> None:
    from trunkline.engine.config.deepspeed_section import batch_sizes
    from trunkline.engine.config.run_config import load_config
    from trunkline.models.registry import config_sections

    paths = sorted((ROOT / "configs").glob("*/*.json"))
    assert len(paths) >= 6
    for path in paths:
        config = load_config(path, sections=config_sections)
        assert batch_sizes(config.deepspeed, 1).world_size == 1
        assert batch_sizes(config.deepspeed, 2).world_size == 2


def spoil(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path, Path], list[str]]:
    def flags(toy: Path, tmp: Path) -> list[str]:
        raw = json.loads((toy / "config.json").read_text())
        change(raw)
        (tmp / name).write_text(json.dumps(raw))
        return ["--config", str(tmp / name), "--output-dir", str(tmp / "out")]

    return flags


def with_flags(*more: str) -> Callable[[Path, Path], list[str]]:
    def flags(toy: Path, tmp: Path) -> list[str]:
        filled = [flag.format(toy=toy, tmp=tmp) for flag in more]
        return ["--config", str(toy / "config.json"), "--output-dir", str(tmp / "out"), *filled]

    return flags


BAD_TRAINING = {
    "an unknown workload": (spoil("c.json", lambda c: c.update(workload="fluids")), "did you mean 'fluid'"),
    "an unknown section": (spoil("c.json", lambda c: c.update(optimizer={})), "unknown key 'optimizer'"),
    "a misspelt model key": (spoil("c.json", lambda c: c["model"].update(linear_skp=1)), "did you mean 'linear_skip'"),
    "an unknown preset": (spoil("c.json", lambda c: c["model"].update(preset="huge")), "model.preset: .*'nano'"),
    "a preset and a width": (spoil("c.json", lambda c: c["model"].update(d_model=64)), "either preset or widths"),
    "a store that is not there": (spoil("c.json", lambda c: c["data"].update(store="nowhere")), "nowhere"),
    "a history beyond the day": (spoil("c.json", lambda c: c["data"].update(history=1000)), "history|minutes"),
    "a skip without history": (
        spoil("c.json", lambda c: (c["data"].update(history=1), c["model"].update(linear_skip=True))), "linear_skip"),
    "an unknown optimizer": (with_flags("--set", "deepspeed.optimizer.type=AdmW"), "unknown optimizer 'AdmW'"),
    "an unknown optimizer setting": (with_flags("--set", "deepspeed.optimizer.params.momentum=1"), "unknown to AdamW"),
    "an unknown schedule": (with_flags("--set", "deepspeed.scheduler.type=Cosine"), "unknown schedule 'Cosine'"),
    "a metric that nobody measures": (
        with_flags("--set", "training.best.metric=acc"), "error: --set: training.best.metric: 'acc' is not measured"),
    "a global batch that does not divide": (
        with_flags("--set", "deepspeed.train_batch_size=12"), "^error: --set: deepspeed.train_batch_size: 12 is not"),
    "a key that FSDP refuses": (
        with_flags("--backend", "fsdp", "--set", "deepspeed.zero_optimization.stage=2",
                   "--set", "deepspeed.zero_optimization.reduce_bucket_size=9"),
        "--set: deepspeed.zero_optimization.reduce_bucket_size: 9 has no effect"),
    "samples without --plan": (with_flags("--samples", "9"), "--samples 9: only with --plan"),
    "more ranks than samples of a batch": (
        with_flags("--plan", "--world-size", "64", "--set", "deepspeed.train_batch_size=32",
                   "--set", "deepspeed.train_micro_batch_size_per_gpu=auto"),
        "--set: deepspeed.train_batch_size: 32 samples .* 64 ranks: use 64 for train_batch_size, or 32 ranks"),
    "a setting without a value": (with_flags("--set", "training.seed"), "expected dotted.key=value"),
    "a setting of the wrong type": (with_flags("--set", "training.steps=many"), 'found "many"'),
    "a schedule longer than the run": (with_flags("--set", "deepspeed.scheduler.params.warmup=500"), "500 is more"),
    "no number of ranks": (with_flags("--plan", "--world-size", "-2"), "--world-size -2: give the number of ranks"),
    "no ranks": (with_flags("--plan", "--world-size", "0"), "--world-size 0: give the number of ranks"),
    "ranks without --plan": (with_flags("--world-size", "2"), "--world-size 2: only with --plan"),
    "an optimizer that the plan refuses": (
        with_flags("--plan", "--set", "deepspeed.optimizer.type=SparseAdam", "--set",
                   'deepspeed.optimizer.params={{"lr":1}}'), "SparseAdam does not support dense gradients"),
    "a misspelt key of an inner object": (
        with_flags("--set", 'deepspeed.torch_autocast={{"enabld":true}}'), "torch_autocast.enabld: unknown key"),
    "a rate that is true": (with_flags("--set", "deepspeed.optimizer.params.lr=true"), "params.lr: .*, found true"),
    "an unknown backend": (with_flags("--backend", "horovod"), "unknown backend"),
    "no resume point": (with_flags("--resume", "{tmp}/nothing"), "no checkpoint in it"),
    "an empty resume point": (with_flags("--resume", ""), "--resume: give none, auto or the path"),
    "a global batch of fillers": (
        with_flags("--set", "deepspeed.train_batch_size=99999999999",
                   "--set", "deepspeed.train_micro_batch_size_per_gpu=auto"),
        "error: --set: deepspeed.train_batch_size: 99999999999 samples, where the training split has "),
    "a DeepSpeed file that is not there": (with_flags("--deepspeed", "{tmp}/ds.json"), "ds.json: cannot be read"),
    "apex that is not installed": (with_flags("--set", "deepspeed.optimizer.type=apex.FusedAdam"), "NVIDIA's apex"),
    "a tracker that is not installed": (with_flags("--set", 'training.trackers=["wandb"]'), r"trunkline\[wandb\]"),
    "LBFGS": (
        with_flags("--set", "deepspeed.optimizer.type=LBFGS", "--set", 'deepspeed.optimizer.params={{"lr":1}}'),
        "closure"),
    "an output folder that is a file": (with_flags("--output-dir", "{toy}/config.json"), "config.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TRAINING)
def test_a_mistake_is_one_message_and_status_2(
    name: str, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, message = BAD_TRAINING[name]
    assert train.main(flags(toy, tmp_path)) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "error: " in error
    assert "Traceback" not in error


def break_run(toy: Path, tmp: Path, change: Callable[[Path], Any]) -> Path:
    shutil.copytree(toy / "run", tmp / "run")
    change(tmp / "run")
    return tmp / "run"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def rewrite(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


BAD_RUNS = {
    "no such run": (lambda run: shutil.rmtree(run), "not the folder of a run"),
    "weights cut short": (lambda run: cut(run / "best/model.safetensors"), "model.safetensors"),
    "a schema that is gone": (lambda run: (run / "best/schema.json").unlink(), "schema.json"),
    "a configuration of another model": (
        lambda run: rewrite(run / "best/config.json", '"nano"', '"tiny"'), "config.json: is not the file that was"),
    "a configuration of another model, meant": (
        lambda run: (rewrite(run / "best/config.json", '"nano"', '"tiny"'), (run / "best/digests.json").unlink()),
        "has shape|lacks|holds"),
    "a configuration that is not JSON": (
        lambda run: ((run / "best/config.json").write_text("{"), (run / "best/digests.json").unlink()),
        "config.json: line 1"),
    "a flipped bit in the weights": (lambda run: flip(run / "best/model.safetensors"), "safetensors: is not the file"),
    "a flipped bit in an asset": (lambda run: flip(run / "best/schema.json"), "schema.json: is not the file"),
    "digests that are no JSON": (lambda run: (run / "best/digests.json").write_text("[" * 9**5), "digests.json: c"),
    "digests of files elsewhere": (
        lambda run: rewrite(run / "best/digests.json", "schema.json", "../schema.json"), "digests.json: cannot"),
    "digests of another kind": (lambda run: (run / "best/digests.json").write_text('{"files": [1]}'), "digests.json:"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RUNS)
@pytest.mark.parametrize("launcher", [evaluate, predict])
def test_a_broken_run_is_one_message_and_status_2(
    name: str, launcher: Any, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    change, message = BAD_RUNS[name]
    run = break_run(toy, tmp_path, change)
    flags = ["--run", str(run), "--out", str(tmp_path / "out")]
    if launcher is predict:
        flags += ["--case", str(toy / "store")]
    assert launcher.main(flags) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken_up(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = break_run(toy, tmp_path, lambda run: cut(next((run / "checkpoints/step-00000006").rglob("*.safetensors"))))
    flags = ["--config", str(toy / "config.json"), "--output-dir", str(run), "--resume", "auto"]
    assert train.main(flags) == 0
    said = capsys.readouterr().out
    assert "step-00000006" in said
    assert ".safetensors has" in said
    assert "resumed from" in said
    assert "step-00000003" in said
    for folder in (run / "checkpoints").glob("step-*"):
        cut(next(folder.rglob("trainer.json")))
    assert train.main(flags) == 2
    assert "no checkpoint can be loaded" in capsys.readouterr().err


def start_rank(rank: int, world_size: int, flags: list[str], own: dict[int, list[str]]) -> tuple[int, str, str]:
    said, heard = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(said):
        status = train.main([*flags, *own.get(rank, [])])
    return status, said.getvalue(), heard.getvalue()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("own", "named"),
    [
        ({1: ["--set", "training.seed=7"]}, "rank 1: training.seed is 7, but"),
        ({1: ["--set", "training.sead=7"]}, "rank 1: cannot start: .*training.sead: unknown key"),
        ({1: ["--set", "data.store=nowhere"]}, "rank 1: cannot start: .*nowhere: no prepared data"),
        ({0: ["--find-micro-batch"]}, "rank 1: --find-micro-batch is false, but true on rank 0"),
        ({1: ["--backend", "horovod"]}, "rank 1: cannot start: --backend horovod: unknown backend"),
        ({0: ["--output-dir", "{tmp}/other"]}, "rank 1 on .* does not see the folder .*/other of rank 0"),
    ],
)
def test_ranks_that_are_started_differently_end_alike(
    own: dict[int, list[str]], named: str, toy: Path, tmp_path: Path
) -> None:
    own = {rank: [flag.format(tmp=tmp_path) for flag in flags] for rank, flags in own.items()}
    flags = ["--config", str(toy / "config.json"), "--output-dir", str(tmp_path / "run")]
    flags += ["--set", "deepspeed.train_micro_batch_size_per_gpu=4"]
    outcomes = run_distributed_test(start_rank, 2, flags, own, backend=None)
    assert [status for status, _, _ in outcomes] == [2, 2]
    assert any(re.search(named, heard) for _, _, heard in outcomes), outcomes
    assert all("error: " in heard and "Traceback" not in heard for _, _, heard in outcomes)
