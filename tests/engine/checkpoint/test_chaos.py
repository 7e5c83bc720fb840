"""Faults in the middle of a save and around it: nothing is lost, and a message says what to do.

`make chaos` runs all of them and prints how many of each were tried and survived; the default run a few of each.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed_test
from tests.engine import tiny
from tests.engine.checkpoint.test_faults import losses
from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer

STEPS, SAVE_EVERY = 12, 3


def config_of(folder: Path, rank: int = 0) -> Any:
    section = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 2}
    training = {"steps": STEPS, "save_every": SAVE_EVERY, "keep_last": 2, "eval_every": 5}
    return tiny_config(folder / f"config-{rank}", data={"noise": 0.1}, training=training, deepspeed=section)


def run(rank: int, world_size: int, folder: Path, name: str, phase: str = "", victims: tuple[int, ...] = ()) -> None:
    config = config_of(folder, rank)
    if rank in victims:
        PHASES[phase](lambda: os.kill(os.getpid(), signal.SIGKILL))
    Trainer(TinyTask(config.data, config.model), config, start(), folder / name, resume="auto").run()


def patched(owner: Any, name: str, around: Callable[[Callable[..., Any], tuple[Any, ...]], Any]) -> None:
    """Replace owner.name in this process, which is about to be killed, by around(original, arguments)."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **options: around(partial(original, **options), arguments))


def at_the_second(occasion: Callable[[tuple[Any, ...]], bool], die: Callable[[], None], after: bool = False) -> Any:
    """Die when `occasion` holds for the second time: a checkpoint is there already."""
    count = itertools.count(1)

    def around(original: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        now = occasion(arguments) and next(count) == 2
        if now and not after:
            die()
        result = original(*arguments)
        if now:
            die()
        return result

    return around


def on_main(verb: str, after: bool = False) -> Callable[[Callable[[], None]], None]:
    def patch(die: Callable[[], None]) -> None:
        from trunkline.engine.checkpoint.checkpoints import Checkpoints

        patched(Checkpoints, "_on_main", at_the_second(lambda arguments: arguments[2] == verb, die, after))

    return patch


def in_a_half_written_file(die: Callable[[], None]) -> None:
    import trunkline.engine.state.sharded_state

    def halve(original: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        path = Path(arguments[1])
        original(*arguments)
        if path.parents[1].name == f".staging-step-{2 * SAVE_EVERY:08d}":
            os.truncate(path, path.stat().st_size // 2)
            die()

    patched(trunkline.engine.state.sharded_state, "save_tensors", halve)


def while_hashing(die: Callable[[], None]) -> None:
    import trunkline.engine.checkpoint.checkpoints

    def around(original: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if f".staging-step-{2 * SAVE_EVERY:08d}" in str(arguments[0]):
            die()
        return original(*arguments)

    patched(trunkline.engine.checkpoint.checkpoints, "entry", around)


def between_the_manifest_and_the_rename(die: Callable[[], None]) -> None:
    import trunkline.engine.checkpoint.checkpoints

    def around(original: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        if Path(arguments[0]).name == f".staging-step-{2 * SAVE_EVERY:08d}":
            die()
        return original(*arguments)

    patched(trunkline.engine.checkpoint.checkpoints, "sync", around)


PHASES: dict[str, Callable[[Callable[[], None]], None]] = {
    "before staging": on_main("prepare"),
    "after staging": on_main("prepare", after=True),
    "in a half-written file": in_a_half_written_file,
    "while hashing": while_hashing,
    "before publishing": on_main("write"),
    "between manifest and rename": between_the_manifest_and_the_rename,  # rank 0 is alone there
    "after publishing": on_main("write", after=True),
    "after pruning": on_main("prune", after=True),
}
VICTIMS = {"rank 0": (0,), "rank 1": (1,), "all ranks": (0, 1)}
FEW = [
    ("in a half-written file", "rank 1"),
    ("between manifest and rename", "rank 0"),
    ("after publishing", "all ranks"),
]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    folder = tmp_path_factory.mktemp("unbroken")
    run_distributed_test(run, 2, folder, "run", backend=None)
    return losses(folder / "run")


@pytest.mark.fault("kill -9 of {victims} {phase} of a save")
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("phase", "victims"),
    [
        pytest.param(phase, victims, marks=() if (phase, victims) in FEW else pytest.mark.slow)
        for phase, victims in itertools.product(PHASES, VICTIMS)
        if (phase, victims) != ("between manifest and rename", "rank 1")
    ],
)
def test_ranks_killed_in_a_save(tmp_path: Path, phase: str, victims: str, unbroken: dict[int, float]) -> None:
    with pytest.raises(AssertionError, match=r"died|another rank has ended"):
        run_distributed_test(run, 2, tmp_path, "run", phase, VICTIMS[victims], backend=None)
    assert losses(tmp_path / "run") != unbroken
    run_distributed_test(run, 2, tmp_path, "run", backend=None)
    assert losses(tmp_path / "run") == unbroken


def mounts_and_trains(rank: int, world_size: int, folder: Path, *steps: str) -> str | None:
    """What these steps print, each of them a process: "train", or a line of shell, which may mount in `folder`.

    None without permission for that.
    """
    ids = os.getuid(), os.getgid()
    if ctypes.CDLL(None).unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER | CLONE_NEWNS
        return None
    Path("/proc/self/setgroups").write_text("deny")
    for name, outside in zip(("uid_map", "gid_map"), ids, strict=True):
        Path("/proc/self", name).write_text(f"0 {outside} 1")
    with (folder / "said").open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    for step in ("mount --make-rprivate /", *steps):
        if step != "train":
            subprocess.run(step, shell=True, check=True, cwd=folder)
        elif (process := os.fork()) == 0:
            status = 1
            try:
                sys.argv = ["tiny.py", str(folder / "disk/run"), str(folder / "tiny.json"), "--resume", "auto"]
                status = tiny.main()
            except BaseException:
                traceback.print_exc()
            finally:
                print("exit code", status, flush=True)
                os._exit(status)
        else:
            os.waitpid(process, 0)
    return (folder / "said").read_text()


def on_a_disk(folder: Path, *steps: str) -> str:
    (said,) = run_distributed_test(mounts_and_trains, 1, folder, *steps, backend=None)
    return said or pytest.skip("no permission for a mount namespace, which a small disk of its own needs")


@pytest.mark.fault("disk full during a save")
def test_a_disk_that_is_full_during_a_save(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    # a checkpoint is 0.8 MB: there is room for two, and for a part of the third
    training = {"steps": STEPS, "save_every": SAVE_EVERY, "keep_last": 4}
    config = tiny_config(tmp_path, model={"hidden": 176}, training=training)
    small, list_it = "mount -t tmpfs -o size=2m tmpfs disk", "ls disk/run/checkpoints"
    larger, keep = "mount -o remount,size=50m disk", "mkdir broken; cp disk/run/metrics.jsonl broken"
    said = on_a_disk(tmp_path, small, "train", list_it, larger, "train", keep)
    assert "No space left on device" in said, said
    assert said.count("exit code 2") == 1
    assert said.count("exit code 0") == 1
    assert "step-00000006" in said
    assert "resumed from" in said
    Trainer(TinyTask(config.data, config.model), config, start(), tmp_path / "whole").run()
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


@pytest.mark.fault("read-only folder")
def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    tiny_config(tmp_path, training={"steps": 3, "save_every": 3})
    said = on_a_disk(tmp_path, "mount -t tmpfs tmpfs disk", "mkdir disk/run", "mount -o remount,ro disk", "train")
    assert "Read-only file system" in said, said
    assert "exit code 2" in said
    assert "Traceback" not in said
