"""Training from a Python program: the same run as the launcher's, and nothing of it is left in the process."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import mse_loss

from tests.distributed import run_distributed_test
from tests.launchers.own_task import Line, line_config
from trunkline import Trained, load_config, parse_config, train
from trunkline.engine.data.order import GlobalBatches
from trunkline.engine.data.randomness import seed_torch
from trunkline.engine.errors import ConfigError, TrunklineError
from trunkline.engine.machine.stopping import SIGNALS, InterruptedRunError
from trunkline.engine.record.metrics_file import is_position, read_metrics

ROOT = Path(__file__).parents[2]


def _by_a_plain_loop(steps: int) -> list[float]:
    """The losses of the same steps by torch alone."""
    seed_torch(42, 0)
    task = Line()
    model, data = task.build_model(), task.dataset("train")
    optimizer = torch.optim.AdamW(
        [{"params": [model.weight], "weight_decay": 0.01}, {"params": [model.bias], "weight_decay": 0.0}], lr=0.1
    )
    batches, losses = GlobalBatches(len(data), 8, 42), []
    for step in range(steps):
        samples = [data[index] for index in batches.samples(step).tolist()]
        x, y = (torch.stack([sample[name] for sample in samples]) for name in ("x", "y"))
        loss = mse_loss(model(x)[:, 0], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _measured(row: dict[str, Any]) -> dict[str, Any]:
    """What a line of metrics.jsonl says of the model."""
    return {key: value for key, value in row.items() if not is_position(key)}


def _state() -> dict[str, Any]:
    """What a training could leave behind in a process."""
    return {
        "environment": dict(os.environ),
        "handlers": [signal.getsignal(number) for number in SIGNALS],
        "group": dist.is_initialized(),
        "threads": torch.get_num_threads(),
        "random": torch.get_rng_state().tolist(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "warnings": list(warnings.filters),
        "loggers": {name: (log.level, log.handlers[:]) for name in (None, "trunkline", "DeepSpeed")
                    for log in [logging.getLogger(name)]},
        "streams": (sys.stdout, sys.stderr),
    }  # fmt: skip


def test_a_task_of_ones_own_trains_as_a_plain_loop_does_and_leaves_nothing_behind(tmp_path: Path) -> None:
    train(Line(), line_config(steps=1), output_dir=tmp_path / "first")  # what is imported once is imported now
    signal.signal(signal.SIGUSR1, handler := lambda number, frame: None)
    before = _state()
    trained = train(Line(), line_config(deterministic=True), output_dir=tmp_path / "run")
    assert _state() == before
    assert signal.getsignal(signal.SIGUSR1) is handler
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    assert losses == pytest.approx(_by_a_plain_loop(20), rel=1e-5)
    assert (trained.folder, trained.step, trained.train["loss"]) == (tmp_path / "run", 20, losses[-1])
    values = [row["loss"] for row in rows if row["split"] == "val"]
    assert _measured(trained.val) == {"loss": values[-1]}
    assert trained.best == {"loss": min(values)}
    assert trained.best_step == 10 * (1 + values.index(min(values)))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["workload"] == "Line"


class InTheWay(Line):
    """During training, a file appears where the report belongs."""

    run: Path

    def summarize(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        (self.run / "report").write_text("")
        return super().summarize(sums)


def test_a_report_that_cannot_be_written_costs_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = InTheWay()
    task.run = tmp_path / "run"
    assert train(task, line_config(), output_dir=task.run).step == 20
    said = capsys.readouterr().out
    assert "no report (" in said
    assert f"`python -m trunkline.engine.record.report {task.run}` writes it once that is mended" in said


class Timed(Line):
    """Its own `seconds`, of training or of validation."""

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return super().loss(model, batch) | ({"seconds": torch.ones(())} if model.training else {})


class TimedOnVal(Line):
    def summarize(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        return super().summarize(sums) | {"tokens_seen": 1.0}


def test_a_metric_that_would_overwrite_where_the_run_is_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^Timed.loss: a metric is named 'seconds', .* rename it$"):
        train(Timed(), line_config(), output_dir=tmp_path / "train")
    with pytest.raises(ConfigError, match=r"^TimedOnVal.summarize: a metric is named 'tokens_seen'"):
        train(TimedOnVal(), line_config(), output_dir=tmp_path / "val")
    assert read_metrics(tmp_path / "val" / "metrics.jsonl") == []


def test_it_trains_in_a_thread_and_one_run_at_a_time(tmp_path: Path) -> None:
    found: list[Trained | Exception] = []
    begun, go = threading.Event(), threading.Event()

    class Waiting(Line):
        def build_model(self) -> torch.nn.Module:
            begun.set()
            go.wait(60)
            return super().build_model()

    thread = threading.Thread(target=lambda: found.append(train(Waiting(), line_config(), output_dir=tmp_path / "a")))
    thread.start()
    begun.wait(60)
    with pytest.raises(TrunklineError, match="this process trains already, in another thread"):
        train(Line(), line_config(), output_dir=tmp_path / "b")
    go.set()
    thread.join()
    (trained,) = found
    assert isinstance(trained, Trained)
    assert trained.step == 20


def test_an_interrupt_saves_the_last_step_and_the_run_resumes_from_it(tmp_path: Path) -> None:
    whole = train(Line(), line_config(), output_dir=tmp_path / "whole")
    before = dist.is_initialized()
    with pytest.raises(InterruptedRunError, match=r"by SIGINT after step \d+, which is saved; resume with"):
        train(Line(interrupt_at=12), line_config(), output_dir=tmp_path / "run")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert dist.is_initialized() == before
    with pytest.raises(ConfigError, match="of an earlier run"):
        train(Line(), line_config(), output_dir=tmp_path / "run")
    resumed = train(Line(), line_config(), output_dir=tmp_path / "run", resume="auto")
    assert _measured(resumed.val) == _measured(whole.val)
    assert (resumed.best, resumed.train["loss"]) == (whole.best, whole.train["loss"])


def test_a_known_workload_trains_as_under_the_launcher(toy: Path, tmp_path: Path) -> None:
    trained = train(load_config(toy / "config.json"), output_dir=tmp_path / "run")
    last = {row["split"]: row for row in read_metrics(toy / "run" / "metrics.jsonl")}
    assert _measured(trained.val) == _measured(last["val"])
    assert trained.train["loss"] == last["train"]["loss"]


def test_a_hanging_run_is_named_and_the_process_lives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Slow(Line):
        def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 6:
                time.sleep(2.0)
            return super().loss(model, batch)

    assert train(Slow(), line_config(steps=4, hang_timeout_s=0.5), output_dir=tmp_path / "run").step == 4
    assert "error: the run hangs: no progress for 0.5 s" in capsys.readouterr().err


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "key": (lambda: line_config(stps=3), r"^configuration: training.stps: unknown key; did you mean 'steps'"),
    "setting": (
        lambda: load_config("fluid/demo", {"training.stps": 3}),
        "^settings: training.stps: unknown key; did you mean 'steps'",
    ),
    "value": (lambda: parse_config({"data": {"at": {1}}}), r"^configuration: data.at: JSON cannot hold \{1\} "),
    "not finite": (lambda: line_config(seed=float("nan")), "^configuration: training.seed: JSON cannot hold nan"),
    "section": (lambda: parse_config({"training": {"steps": 1}}), "^configuration: the section 'deepspeed' is missing"),
    "workload": (
        lambda: parse_config({"workload": "fluit", "data": {}, "model": {}, "training": {}, "deepspeed": {}}),
        "workload: unknown 'fluit'; did you mean 'fluid'",
    ),
    "no workload": (lambda: train(line_config()), r"^configuration: workload: is missing: name one of .*fluid"),
    "no configuration": (lambda: train(Line()), r"^train: expected train\(config\) or train\(task, config\)"),
    "a dictionary": (lambda: train(Line(), {"training": {}}), "with a config of .* found a dict$"),  # type: ignore[arg-type]
    "no task": (lambda: train(3, line_config()), "^int is no task: derive it from"),  # type: ignore[arg-type]
    "backend": (lambda: train(Line(), line_config(), backend="ddp"), "unknown backend; use deepspeed, fsdp or auto"),
}


@pytest.mark.parametrize("what", WRONG)
def test_mistakes_are_named(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (call, said), before = WRONG[what], dist.is_initialized()
    with pytest.raises(ConfigError, match=said):
        call()
    assert dist.is_initialized() == before


def test_values_are_copied_and_what_a_task_of_ones_own_is_given_is_kept() -> None:
    values = {"data": {"sizes": (1, 2)}, "training": {"steps": 1}, "deepspeed": {"train_batch_size": 1}}
    values["deepspeed"]["optimizer"] = {"type": "SGD", "params": {"lr": 1}}
    config = parse_config(values)
    assert values["data"] == {"sizes": (1, 2)}
    assert config.data.sizes == [1, 2]
    assert config.as_dict()["data"] == {"sizes": [1, 2]}
    assert config.as_dict()["model"] == {}


def in_a_script(rank: int, world_size: int, folder: Path, backends: list[str]) -> list[Any]:
    """What a user's own script does under torchrun."""
    variables = dict(os.environ)
    found = [train(Line(), line_config(), output_dir=folder / f"run-{number}", backend=backend).val["loss"]
             for number, backend in enumerate(backends)]  # fmt: skip
    try:
        train(Line(), line_config(seed=rank), output_dir=folder / "wrong")
    except ConfigError as error:
        found.append(str(error))
    return [*found, dict(os.environ) == variables, dist.is_initialized()]


@pytest.mark.distributed
@pytest.mark.slow
def test_a_script_of_two_ranks_trains_again_and_again(tmp_path: Path) -> None:
    """Once, and by the same function, two ranks train in the tests of launchers/train.py."""
    backends = ["fsdp", "deepspeed", "fsdp", "deepspeed"]
    first, second = run_distributed_test(in_a_script, 2, tmp_path, backends, backend=None)
    assert first == second
    *losses, said, as_before, joined = first
    assert (as_before, joined) == (True, False)
    one = train(Line(), line_config(), output_dir=tmp_path / "one").val["loss"]
    assert losses == pytest.approx([one] * len(backends), rel=1e-5)
    assert "rank 1: training.seed is 1, but 0 on rank 0" in said


LIGHT = """
import sys, trunkline
assert not {"torch", "pydantic", "numpy"} & sys.modules.keys(), "import trunkline is not light"
from trunkline.kernels.attention import flash_attention
mine = {name for name in sys.modules if name.startswith("trunkline.") and not name.startswith("trunkline.kernels")}
heavy = {"pydantic", "deepspeed"} & sys.modules.keys()
assert not mine and not heavy, (mine, heavy)
assert {"Task", "load_config", "parse_config", "train"} <= set(trunkline.__all__)
"""


def test_importing_trunkline_is_light_and_kernels_need_nothing_of_the_engine() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("where", [{"output_dir": ""}, {"resume": ""}])
def test_an_empty_path_is_an_error_and_nothing_is_trained(where: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match=r"give .*, found ''"):
        train(Line(), line_config(), **{"output_dir": tmp_path / "run"} | where)  # type: ignore[arg-type]
    assert not (tmp_path / "run/metrics.jsonl").exists()
