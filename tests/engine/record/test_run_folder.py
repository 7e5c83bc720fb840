"""One folder, one run, one machine's view of it; and nothing that an earlier run has left is lost."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import fork_server, run_distributed_test
from tests.engine.test_trainer import lines, train
from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.errors import CheckpointError, ConfigError, TrunklineError
from trunkline.engine.ranks.distributed import Ranks, start
from trunkline.engine.record import run_folder
from trunkline.engine.record.run_folder import LOCK, claim, in_use, records, release
from trunkline.engine.trainer import Trainer

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def hold(folder: Path, ready: Connection, workers: bool) -> None:
    claim(folder, ALONE)
    if workers and os.fork() == 0:  # as torch's loader does
        time.sleep(30)
        os._exit(0)
    ready.send(os.getpid())
    time.sleep(30)


def holder(folder: Path, workers: bool = False) -> Any:
    """A process that holds the folder."""
    context = fork_server()
    mine, its = context.Pipe()
    process = context.Process(target=hold, args=(folder, its, workers), daemon=True)
    process.start()
    assert mine.recv() == process.pid
    return process


def test_a_folder_in_use_is_refused_with_machine_process_and_time_and_nothing_in_it_is_touched(tmp_path: Path) -> None:
    run = tmp_path / "run"
    staging = run / "checkpoints/.staging-step-00000004"
    staging.mkdir(parents=True)
    process = holder(run)
    try:
        named = (
            rf"{run}: is in use: process {process.pid} on {re.escape(socket.gethostname())} trains in it since 20\d\d-"
        )
        for resume in ("none", "auto"):
            with pytest.raises(ConfigError, match=named):
                train(run, tiny_config(tmp_path), resume=resume)
        assert staging.is_dir()
        assert sorted(path.name for path in run.iterdir()) == [LOCK, "checkpoints"]
    finally:
        process.kill()
        process.join()
    train(run, tiny_config(tmp_path, training={"steps": 2}))
    assert not staging.exists()


def test_after_kill_9_a_folder_is_free_at_once_also_while_workers_of_the_dead_live_on(tmp_path: Path) -> None:
    process = holder(tmp_path, workers=True)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    claim(tmp_path, ALONE)
    release(tmp_path)


def test_one_process_may_train_again_in_a_folder_and_lets_it_go_at_the_end(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, training={"steps": 4})
    Trainer(TinyTask(config.data, config.model), config, start(), tmp_path / "run")  # never run
    train(tmp_path / "run", config)
    holder(tmp_path / "run").kill()
    assert json.loads((tmp_path / "run" / LOCK).read_text())["host"] == socket.gethostname()


def test_a_folder_that_was_deleted_and_made_anew_is_held_anew(tmp_path: Path) -> None:
    run = tmp_path / "run"
    claim(run, ALONE)
    shutil.rmtree(run)
    claim(run, ALONE)
    assert json.loads((run / LOCK).read_text())["pid"] == os.getpid()
    release(run)


def put_fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (put_fifo, "is not a plain file"),
        (Path.mkdir, "Is a directory"),
        (lambda path: path.symlink_to("/dev/null"), "symbolic links"),
    ],
)
def test_a_lock_of_the_wrong_kind_is_an_error(tmp_path: Path, spoil: Callable[[Path], Any], named: str) -> None:
    spoil(tmp_path / LOCK)
    with pytest.raises(ConfigError, match=f"{named}.*choose another --output-dir"):
        claim(tmp_path, ALONE)


@pytest.mark.parametrize("content", ["", "[" * 100_000, "[1]", "null", '{"pid": [1]}', "\x00" * 9000])
def test_whatever_an_unheld_lock_says_a_run_starts(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content)
    claim(tmp_path, ALONE)
    release(tmp_path)


@pytest.mark.parametrize("name", ["x\0y", "x" * 300])
def test_a_folder_that_cannot_be_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"(?s)cannot be used: .*choose another --output-dir"):
        claim(tmp_path / name, ALONE)


def start_apart(rank: int, world_size: int, folder: Path, relative: bool) -> str:
    own = folder / f"machine-{rank}"
    own.mkdir()
    os.chdir(own)
    config = tiny_config(own, deepspeed={"train_micro_batch_size_per_gpu": 1})
    run = Path("run") if relative else own / "run"
    try:
        Trainer(TinyTask(config.data, config.model), config, start(), run)
    except TrunklineError as error:
        return str(error)
    return ""


@pytest.mark.distributed
@pytest.mark.parametrize("relative", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_folder_that_the_ranks_do_not_share_is_found_at_the_start(tmp_path: Path, relative: bool) -> None:
    one, two = run_distributed_test(start_apart, 2, tmp_path, relative, backend=None)
    assert one == two
    assert "rank 1 on " in one
    assert "does not see the folder" in one
    assert "No such file or directory" in one
    assert not (tmp_path / "machine-1/run").exists()


def finished(folder: Path, **training: Any) -> None:
    train(folder, tiny_config(folder.parent, training=training))


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*")) if path.is_file() and path.name != LOCK
    }  # fmt: skip


def leave_only(folder: Path, *names: str) -> None:
    for path in folder.iterdir():
        if path.name not in names:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "names",
    [("metrics.jsonl", "best", "final", "config.json"), ("metrics.jsonl",), ("best",), ("final",), ("checkpoints",)],
)
def test_a_start_over_what_a_run_has_left_is_refused_with_three_ways_out(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    finished(run)
    leave_only(run, *names)
    before = content(run)
    ways = f"--resume auto --output-dir {run}, give another --output-dir, or move the folder away or delete it"
    with pytest.raises(ConfigError, match=rf"{run}: holds {names[0]}.* of an earlier run; resume with {ways}"):
        finished(run)
    assert content(run) == before


def test_checkpoints_that_were_set_aside_are_an_earlier_run_s_too(tmp_path: Path) -> None:
    finished(tmp_path / "run", steps=4)
    leave_only(tmp_path / "run", "checkpoints")
    (tmp_path / "run/checkpoints/step-00000004").rename(tmp_path / "run/checkpoints/aside-step-00000004")
    with pytest.raises(ConfigError, match="holds checkpoints/ of an earlier run"):
        finished(tmp_path / "run")


def test_to_go_on_from_another_run_over_what_a_run_has_left_is_refused(tmp_path: Path) -> None:
    finished(tmp_path / "one", steps=4)
    finished(tmp_path / "two", steps=4)
    before = content(tmp_path / "two")
    config = tiny_config(tmp_path)
    for resume in (tmp_path / "one", tmp_path / "one/checkpoints/step-00000004"):
        with pytest.raises(
            ConfigError, match=f"two: holds .*, and --resume {resume} is another one; resume with --resume auto"
        ):
            train(tmp_path / "two", config, resume=str(resume))
    assert content(tmp_path / "two") == before
    assert train(tmp_path / "two", config, resume=str(tmp_path / "two/checkpoints/step-00000004")).progress.step == 12


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew_by_resume_auto(tmp_path: Path) -> None:
    run, config = tmp_path / "run", tiny_config(tmp_path)
    train(run, config)
    shutil.rmtree(run / "checkpoints")
    before = content(run)
    for gone in ((), ("final", "best")):
        for name in gone:
            shutil.rmtree(run / name)
        with pytest.raises(
            CheckpointError, match=r"run: holds metrics.jsonl.*, but its checkpoints are gone.*put them back"
        ):
            train(run, config, resume="auto")
    assert (run / "metrics.jsonl").read_bytes() == before["metrics.jsonl"]


def test_what_was_logged_before_the_first_checkpoint_is_set_aside_and_the_run_begins_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = tmp_path / "run", tiny_config(tmp_path, training={"eval_every": 1})
    for attempt in (1, 2):
        trainer = Trainer(TinyTask(config.data, config.model), config, start(), run, resume="auto")
        step = trainer.backend.step

        def killed(step: Callable[[], Any] = step, trainer: Trainer = trainer) -> Any:
            if trainer.progress.step == 3:
                raise TrunklineError("killed")
            return step()

        trainer.backend.step = killed  # type: ignore[method-assign]
        with pytest.raises(TrunklineError, match="killed"):
            trainer.run()
        assert len(lines(run)) == 3
        assert len(list(run.glob("aside-metrics*"))) == attempt - 1
    train(run, config, resume="auto")
    assert len(lines(run)) == 12
    logged = [run / "aside-metrics.jsonl", run / "aside-metrics.jsonl.2"]
    assert [len(path.read_text().splitlines()) for path in logged] == [6, 6]  # a step and an evaluation each
    assert (run / "aside-best-step-3/model.safetensors").is_file()
    said = capsys.readouterr().out
    assert "metrics.jsonl of a start that saved no checkpoint: renamed to aside-metrics.jsonl.2" in said


def test_a_start_that_came_to_nothing_does_not_stand_in_the_way(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, training={"steps": 4})
    trainer = Trainer(TinyTask(config.data, config.model), config, start(), tmp_path / "run")
    trainer.trackers.close()
    assert (tmp_path / "run/config.json").exists()
    assert records(tmp_path / "run") == []
    train(tmp_path / "run", config)
    assert records(tmp_path / "run") == ["checkpoints/", "metrics.jsonl", "best/", "final/"]


def test_a_trainer_that_cannot_start_lets_its_folder_go_and_one_that_trains_does_not(tmp_path: Path) -> None:
    config, ranks = tiny_config(tmp_path), start()
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json cannot be read"):
        Trainer(TinyTask(config.data, config.model), config, ranks, tmp_path / "run", resume=str(tmp_path))
    assert (tmp_path / "run").resolve() not in run_folder._held
    claim(tmp_path / "run", ranks)
    with in_use(tmp_path / "run"), pytest.raises(ConfigError, match="this process trains in it"):
        claim(tmp_path / "run", ranks)
    assert (tmp_path / "run").resolve() not in run_folder._held


def test_a_rank_that_outlives_rank_0_keeps_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "_TRIES", 2)
    claim(tmp_path, start())
    release(tmp_path)
    with (tmp_path / ".lock-ranks").open("w") as other:  # as another process opens it
        fcntl.flock(other, fcntl.LOCK_SH)
        with pytest.raises(ConfigError, match="other ranks of a run whose rank 0 has ended still live"):
            claim(tmp_path, start())
    claim(tmp_path, start())
    release(tmp_path)


def test_a_folder_whose_second_lock_is_of_the_wrong_kind_is_not_held(tmp_path: Path) -> None:
    (tmp_path / ".lock-ranks").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot be used"):
        claim(tmp_path, ALONE)
    with (tmp_path / LOCK).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
