"""Faults in the middle of a save and around it: nothing is lost, and a message says what to do.

`make chaos` runs all of them and prints how many of each were tried and survived; the default run a few of each.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_distributed_test
from tests.engine.checkpoint.test_faults import losses
from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer

ROOT = Path(__file__).parents[3]
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


def in_a_namespace(script: str, folder: Path) -> str:
    """What a shell script prints that may mount file systems of its own."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no permission for a mount namespace, which a small disk of its own needs")
    done = subprocess.run(
        ["unshare", "-rm", "bash", "-euc", script], capture_output=True, text=True, cwd=ROOT, timeout=120,
        env=os.environ | {"FOLDER": str(folder), "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return done.stdout + done.stderr


TRAIN = '$PYTHON tests/engine/tiny.py $FOLDER/disk/run $FOLDER/tiny.json --resume auto || echo "exit code $?"\n'


@pytest.mark.fault("disk full during a save")
def test_a_disk_that_is_full_during_a_save(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    # a checkpoint is 0.8 MB: there is room for two, and for a part of the third
    training = {"steps": STEPS, "save_every": SAVE_EVERY, "keep_last": 4}
    config = tiny_config(tmp_path, model={"hidden": 176}, training=training)
    script = "mount -t tmpfs -o size=2m tmpfs $FOLDER/disk\n" + TRAIN
    script += "ls $FOLDER/disk/run/checkpoints; mount -o remount,size=50m $FOLDER/disk\n" + TRAIN
    said = in_a_namespace(script + "mkdir $FOLDER/broken; cp $FOLDER/disk/run/metrics.jsonl $FOLDER/broken", tmp_path)
    assert "No space left on device" in said, said
    assert said.count("exit code 2") == 1
    assert "step-00000006" in said
    assert "resumed from" in said
    Trainer(TinyTask(config.data, config.model), config, start(), tmp_path / "whole").run()
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


@pytest.mark.fault("read-only folder")
def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    tiny_config(tmp_path, training={"steps": 3, "save_every": 3})
    script = "mount -t tmpfs tmpfs $FOLDER/disk; mkdir $FOLDER/disk/run; mount -o remount,ro $FOLDER/disk\n" + TRAIN
    said = in_a_namespace(script, tmp_path)
    assert "Read-only file system" in said, said
    assert "exit code 2" in said
    assert "Traceback" not in said
