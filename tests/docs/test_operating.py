"""docs/operating.md: its commands are run as they stand there, but for names, sizes and ports."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.distributed import find_free_port
from tests.docs.pages import ROOT, commands, section
from tests.docs.programs import ENVIRONMENT, started
from tests.models.fluid.toy_network import write_toy_store
from tests.processes import members, wait_until
from trunkline.engine.record.metrics_file import read_metrics
from trunkline.launchers import train

PAGE = "docs/operating.md"
STARTS = {
    "python": ["python"],
    "deepspeed": ["deepspeed", "--num_gpus", "2"],
    "torchrun": ["torchrun", "--nproc_per_node", "2"],
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a toy store, a configuration, and its unbroken run on one process."""
    folder = tmp_path_factory.mktemp("operating")
    write_toy_store(folder / "store")
    config = json.loads((ROOT / "configs/fluid/nano.json").read_text())
    config["data"] |= {"store": str(folder / "store"), "history": 2}
    config["training"] |= {"steps": 200, "eval_every": 200, "save_every": 200, "log_every": 1, "eval_samples": 8}
    config["training"] |= {"num_workers": 0, "trackers": []}
    config["training"].pop("epochs")
    config["deepspeed"] |= {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": False}}
    config["deepspeed"]["zero_optimization"] = {"stage": 1}
    config["deepspeed"]["scheduler"] = {"type": "Constant", "params": {}}  # so that a longer run begins as this one
    (folder / "toy.json").write_text(json.dumps(config))
    assert train.main(["--config", str(folder / "toy.json"), "--output-dir", str(folder / "unbroken")]) == 0
    return folder


def losses(run: Path) -> list[float]:
    """Of all steps, in order; a step that is logged twice counts as what was logged last."""
    rows = {row["step"]: row["loss"] for row in read_metrics(run / "metrics.jsonl") if row["split"] == "train"}
    assert list(rows) == list(range(1, len(rows) + 1))
    return list(rows.values())


def shown(heading: str, program: str) -> list[list[str]]:
    """The commands of a section that call a program, without what a shell puts around them."""
    found = [words for words in commands(section(PAGE, heading)) if program in words[:2]]
    assert found
    return [words[words.index(program) :] for words in found]


def on_this_machine(words: Sequence[str], toy: Path, run: Path, port: int, ranks: int = 2) -> list[str]:
    """A command of the page with `ranks` ranks in place of 8, the toy configuration, and this machine as node0."""
    line = shlex.join(words)
    for old, new in (
        (r"(--num_gpus|--nproc_per_node) \d+", rf"\1 {ranks}"),
        (r"runs/fluid/\S*", str(run)),
        (r"(configs/)?fluid/large(\.json)?(?= |$)", str(toy / "toy.json")),
        (r"node0:\d+", f"127.0.0.1:{port}"),
        (r"--master_addr node0", f"--master_addr 127.0.0.1 --master_port {port}"),
        (r"launchers/train.py", f"launchers/train.py --output-dir {run}"),
    ):
        line = re.sub(old, new, line)
    if words[0] in ("deepspeed", "torchrun") and "node0" not in shlex.join(words):
        line = re.sub(r"^\w+", rf"\g<0> --master_port {port}", line)
    return shlex.split(line)


def has_begun(run: Path, rows: int = 3) -> bool:
    return (run / "metrics.jsonl").exists() and len(read_metrics(run / "metrics.jsonl")) >= rows


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-*/MANIFEST.json"))


@pytest.mark.slow
@pytest.mark.distributed
def test_the_job_file_runs_turn_after_turn_to_the_losses_of_the_unbroken_run(toy: Path, tmp_path: Path) -> None:
    for name in ("sbatch", "srun", "scontrol"):
        script = f'#!/bin/sh\nexec {sys.executable} {ROOT}/tests/docs/fake_slurm.py {name} "$@"\n'
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    run = tmp_path / "run"
    ((sbatch, *words),) = shown("Slurm", "sbatch")
    words = on_this_machine(words, toy, run, 0)
    slurm = {"FAKE_SLURM": str(tmp_path), "FAKE_PROGRESS": str(run / "metrics.jsonl"), "FAKE_LIMITS": "20,80"}
    environment = ENVIRONMENT | slurm | {"PATH": f"{tmp_path}:{ENVIRONMENT['PATH']}"}
    with started([sbatch, "--nodes=2", "--ntasks-per-node=1", *words], env=environment) as job:
        said = job.communicate(timeout=900)[0]
    assert re.findall(r"^turn \d: status \d+", said, re.MULTILINE) == [
        "turn 0: status 75", "turn 1: status 75", "turn 2: status 0"
    ], said  # fmt: skip
    assert said.count("stopped: by SIGUSR1") >= 2, said
    assert losses(run) == pytest.approx(losses(toy / "unbroken"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.distributed
def test_one_command_line_serves_for_every_turn_on_one_machine_and_on_any_number_of_ranks(
    toy: Path, tmp_path: Path
) -> None:
    headings = ("One machine", "Another number of GPUs")
    starts = [
        words for heading in headings for words in commands(section(PAGE, heading)) if words[0] in STARTS
    ]  # fmt: skip
    assert [words[0] for words in starts] == ["python", "deepspeed", "torchrun", "torchrun", "deepspeed", "torchrun"]
    run, done = tmp_path / "run", 0
    for words in starts:
        with started([*on_this_machine(words, toy, run, find_free_port()), "--steps", "100000"]) as process:
            wait_until(lambda done=done: has_begun(run, done + 5))
            ranks = ranks_of(process)
            for rank in ranks:
                rank.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=600)[0]
            assert not psutil.wait_procs(ranks, timeout=600)[1]
        assert process.returncode == (1 if words[0] == "torchrun" else 75), said
        done = len(losses(run))
    unbroken = losses(toy / "unbroken")
    assert losses(run)[: len(unbroken)] == pytest.approx(unbroken[:done], rel=1e-5)


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that train: those whose program is launchers/train.py itself."""
    lines = {member: [word for word in member.cmdline() if not word.startswith("-")] for member in members(process.pid)}
    ranks = [member for member, words in lines.items() if words[1:2] == ["launchers/train.py"]]
    assert ranks
    return ranks


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_machines_that_are_this_one_train_as_one_process_does(toy: Path, tmp_path: Path, launcher: str) -> None:
    (tmp_path / "hosts").write_text("node0 slots=1\nnode1 slots=1\n")
    lines = shown("Several machines", launcher)
    lines *= 3 - len(lines)  # torchrun: the same line on each
    port, run = find_free_port(), tmp_path / "run"
    starts = [on_this_machine(words, toy, run, port, ranks=1) for words in lines]
    starts = [[str(tmp_path / "hosts") if word == "hosts" else word for word in words] for words in starts]
    with started(starts[0]) as first, started(starts[1]) as second:
        said = first.communicate(timeout=900)[0], second.communicate(timeout=60)[0]
    assert (first.returncode, second.returncode) == (0, 0), said
    assert json.loads((run / "plan.json").read_text())["world_size"] == 2
    assert losses(run) == pytest.approx(losses(toy / "unbroken"), rel=1e-5)


def statuses() -> dict[tuple[str, str], int]:
    """(what happened, launcher) -> status, from the page's table."""
    rows = [line.strip("| ").split(" | ") for line in section(PAGE, "Exit statuses").splitlines() if line[:1] == "|"]
    launchers = [cell.strip("`") for cell in rows[0][1:5]]
    cells = {(row[0], name): status for row in rows[2:] for name, status in zip(launchers, row[1:5], strict=True)}
    return {key: int(status) for key, status in cells.items() if status != "-"}


def test_the_table_of_statuses_is_whole() -> None:
    assert len(statuses()) == 5 * 4 - 2
    assert {status for (_, name), status in statuses().items() if name == "python"} == {0, 2, 75, 76}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", STARTS)
def test_launchers_end_with_the_statuses_of_the_table(toy: Path, tmp_path: Path, launcher: str) -> None:
    words = [*STARTS[launcher], "launchers/train.py", "--config", "configs/fluid/large.json"]

    def command(name: str, *flags: str) -> list[str]:
        return [*on_this_machine(words, toy, tmp_path / name, find_free_port()), *flags]

    def ends(name: str, *flags: str) -> int:
        with started(command(name, *flags)) as process:
            process.communicate(timeout=600)
            return process.returncode

    def is_sent(name: str, number: signal.Signals, whom: Callable[[subprocess.Popen[str]], Sequence[Any]]) -> int:
        flags = ["--steps", "100000", "--set", "training.hang_timeout_s=60"]
        with started(command(name, *flags)) as process:
            wait_until(lambda: has_begun(tmp_path / name))
            ranks = ranks_of(process)
            for each in whom(process):
                each.send_signal(number)
            process.communicate(timeout=600)
            assert not psutil.wait_procs(ranks, timeout=600)[1]
            assert bool(checkpoints(tmp_path / name)) == (number != signal.SIGSTOP)
            return process.returncode if process.returncode >= 0 else 128 - process.returncode

    found = {
        "the run is done": ends("done", "--steps", "2"),
        "a mistake that you can mend": ends("mistake", "--set", "training.seeed=1"),
        "a signal to each rank": is_sent("signal", signal.SIGUSR1, ranks_of),
    }
    if launcher != "python":
        found["TERM to the launcher alone"] = is_sent("launcher", signal.SIGTERM, lambda process: [process])
        found["a rank hangs for `training.hang_timeout_s`"] = is_sent(
            "hang", signal.SIGSTOP, lambda process: ranks_of(process)[:1]
        )
    assert found == {what: statuses()[what, launcher] for what in found}


def can_make_process_namespaces() -> bool:
    program = shutil.which("unshare")
    return program is not None and subprocess.run([program, "-p", "-f", "true"], check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not can_make_process_namespaces(), reason="needs the right to make a process namespace")
@pytest.mark.parametrize(
    ("launcher", "status"), [("python", 75), ("torchrun", 1), ("deepspeed", None)]
)  # fmt: skip
def test_process_1_of_a_container_hears_term(toy: Path, tmp_path: Path, launcher: str, status: int | None) -> None:
    words = [*STARTS[launcher], "launchers/train.py", "--config", "configs/fluid/large.json", "--steps", "100000"]
    words += ["--set", "training.save_every=100000"]
    command = on_this_machine(words, toy, tmp_path / "run", find_free_port())
    with started(["unshare", "-p", "-f", "--kill-child", *command]) as process:
        wait_until(lambda: has_begun(tmp_path / "run"))
        (first,) = psutil.Process(process.pid).children()
        first.send_signal(signal.SIGTERM)
        if status is None:
            before = len(read_metrics(tmp_path / "run/metrics.jsonl"))
            wait_until(lambda: len(read_metrics(tmp_path / "run/metrics.jsonl")) > before + 200)
            assert first.is_running()
            assert not checkpoints(tmp_path / "run")
            return
        said = process.communicate(timeout=600)[0]
    assert process.returncode == status, said
    assert checkpoints(tmp_path / "run")


@pytest.mark.slow
def test_the_run_is_seen_in_tensorboard_and_mlflow(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the extra 'mlflow' is not installed")
    for name in ("MLFLOW_ALLOW_FILE_STORE", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "true")
        monkeypatch.setitem(ENVIRONMENT, name, "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    ((_, *words),) = [line for line in shown("Watching a run", "python") if "mlflow" in shlex.join(line)]
    command = on_this_machine(["python", *words, "--steps", "4"], toy, tmp_path / "runs/toy", 0)
    command = [word.replace("http://127.0.0.1:0", str(tmp_path / "mlruns")) for word in command]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (shown_run,) = mlflow.search_runs(experiment_names=["gas"], output_format="list")
    assert "train/loss" in shown_run.data.metrics
    ((_, *flags),) = shown("Watching a run", "tensorboard")
    port = find_free_port()
    with started(["tensorboard", *flags, "--port", str(port)], cwd=tmp_path):
        wait_until(lambda: "toy/tensorboard" in answers(f"http://127.0.0.1:{port}/data/runs"))


def answers(address: str) -> str:
    try:
        return urllib.request.urlopen(address, timeout=10).read().decode()
    except OSError:
        return ""


@pytest.mark.slow
def test_a_run_takes_the_space_that_the_page_says(toy: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ["--config", str(toy / "toy.json"), "--output-dir", str(run), "--steps", "8"]
    assert train.main([*flags, "--set", "training.save_every=1", "--set", "training.keep_last=2"]) == 0
    plan = json.loads((run / "plan.json").read_text())
    kept = [path.parent for path in checkpoints(run)]
    assert len(kept) == 2  # and one more while a new one is written
    assert plan["checkpoint_bytes"] == pytest.approx(12 * plan["parameters"], rel=1e-3)
    for folder in kept:
        assert plan["checkpoint_bytes"] < size(folder) < 1.15 * plan["checkpoint_bytes"]
    for name in ("best", "final"):
        assert (run / name / "model.safetensors").stat().st_size == pytest.approx(4 * plan["parameters"], rel=0.1)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
