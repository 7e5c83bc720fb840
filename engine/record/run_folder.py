"""A run's folder: one run at a time, the same on all ranks.

Nothing that an earlier run left is lost.

    claim(folder, ranks)        hold the folder against a second start, and see that all ranks share it
    with in_use(folder): ...    while it trains: also this process may not claim it again; it is let go at the end
    release(folder)             if it never trains; the end of the process, kill -9 too, does the same
    records(folder)             the names of what a run has left in it
    had_checkpoints(folder)     whether that run had saved one
    set_records_aside(folder)   move what a run has logged that was killed before its first checkpoint

Rank 0 holds a lock of the kernel (flock) on <folder>/.lock, and writes there who holds it. The other ranks share one on
<folder>/.lock-ranks, so that a rank which outlives rank 0 keeps the folder, too. A lock belongs to the open file: it is
free at the moment that the process is gone, and no other reader of the file takes it away. Processes that are forked
from this one (loader workers) close the file at once, so that none of them keeps it.

The rule for network file systems: the lock holds between machines on NFS 4, on NFS 3 with its lock service, on CephFS,
GPFS and BeeGFS with global locks, and on Lustre that is mounted with `flock`. On NFS it is free a lease (about 90 s)
after its machine died. Where locks are kept to one machine (`nolock`, `local_lock`, `localflock`), starts on two
machines are not told apart; where there are none, a warning says so.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trunkline.engine.config.strict import read_json_object
from trunkline.engine.errors import ConfigError
from trunkline.engine.machine.files import try_lock, unused
from trunkline.engine.machine.log import LOG
from trunkline.engine.ranks.distributed import Ranks, from_main, gather
from trunkline.engine.record.metrics_file import METRICS, read_metrics

LOCK, RANKS_LOCK = ".lock", ".lock-ranks"
_LONGEST = 4096  # bytes of it that are read
_TRIES, _PAUSE_S = 10, 0.5  # a network file system may show an old state for a while

_held: dict[Path, int] = {}
"""By folder, the open lock. A process may claim again what it holds."""
_in_use: set[Path] = set()
"""The folders that this process trains in."""


def _let_go() -> None:
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()
    _in_use.clear()


os.register_at_fork(after_in_child=_let_go)


def claim(folder: Path, ranks: Ranks) -> None:
    """Make the folder and hold it on rank 0. Called on all ranks, before anything is written into it.

    Raises:
        ConfigError: on all ranks. Another process holds it (the error names machine, process and since when), it cannot
            be written, or a rank does not see the folder that rank 0 sees.
    """
    if not ranks.is_main:
        release(folder)  # of a run before, so that rank 0 finds it free
    token, problem = from_main(_take(folder) if ranks.is_main else ("", ""), ranks)
    if problem:
        raise ConfigError(problem)
    why = _why_another(folder, token)
    if not why and not ranks.is_main:
        _share(folder)
    seen = gather((str(folder), socket.gethostname(), why), ranks)
    for rank, (its_folder, host, why) in enumerate(seen):
        if why:
            release(folder)
            raise ConfigError(
                f"--output-dir {its_folder}: rank {rank} on {host} does not see the folder {seen[0][0]} of rank 0 on "
                f"{seen[0][1]} ({why}): give all ranks the same folder, on a file system that their machines share"
            )


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Train in a folder that was claimed, and let it go afterwards."""
    path = folder.resolve()
    _in_use.add(path)
    try:
        yield
    finally:
        _in_use.discard(path)
        release(folder)


def release(folder: Path) -> None:
    """Let the folder go, if this process holds it."""
    descriptor = _held.pop(folder.resolve(), None)
    if descriptor is not None:
        os.close(descriptor)


def records(folder: Path) -> list[str]:
    """The names of what a run has left in the folder; not what a start leaves that came to nothing."""
    left = []
    if any((folder / "checkpoints").glob("step-*")) or any((folder / "checkpoints").glob("aside-*")):
        left.append("checkpoints/")
    with contextlib.suppress(OSError):
        if (folder / METRICS).stat().st_size:
            left.append(METRICS)
    return left + [f"{name}/" for name in ("best", "final") if any((folder / name).glob("*"))]


def had_checkpoints(folder: Path) -> bool:
    """Whether what is in the folder could only be left by a run that had saved a checkpoint, or went on from one.

    A save ends before the next one begins, so a run that has logged a step past its second save had a checkpoint.
    """
    if any((folder / "checkpoints").glob("aside-*")) or any((folder / "final").glob("*")):
        return True
    try:
        if not (folder / METRICS).is_file():
            return False
        training = read_json_object(folder / "config.json")["training"]
        log_every, save_every = (_in_steps(folder, training, key) for key in ("log_every", "save_every"))
        steps = [row["step"] for row in read_metrics(folder / METRICS) if row.get("split") == "train"]
        return bool(steps) and (steps[0] > log_every or steps[-1] > 2 * save_every)
    except (OSError, ConfigError, KeyError, TypeError, RecursionError):
        return False


def _in_steps(folder: Path, training: dict[str, Any], key: str) -> int:
    """A length of the training section in steps. Where it is in epochs, the plan knows how many they are."""
    asked = training[key]
    return read_json_object(folder / "plan.json")["in_steps"][f"training.{key}"] if isinstance(asked, dict) else asked


def set_records_aside(folder: Path) -> None:
    """Rename metrics.jsonl if it holds anything, and say so; best.py does the same with weights. Raises OSError."""
    if METRICS in records(folder):
        aside = unused(folder / f"aside-{METRICS}")
        (folder / METRICS).rename(aside)
        LOG.info(f"note: {folder}: metrics.jsonl of a start that saved no checkpoint: renamed to {aside.name}")


def _take(folder: Path) -> tuple[str, str]:
    """A token that stands in the folder's lock, which this process holds now; or what is in the way."""
    token = secrets.token_hex(16)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder.resolve()
        if path in _in_use:
            return "", f"--output-dir {folder}: is in use: this process trains in it; wait for that run to end"
        if path in _held and not (path / LOCK).exists():  # the folder was deleted, or moved away, and made anew
            release(path)
        if path not in _held:
            descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            problem = "its lock could not be taken"
            try:
                problem = _locked(descriptor, folder) or _ranks_that_live(path)
            finally:
                if problem:
                    os.close(descriptor)
            if problem:
                return "", problem
            _held[path] = descriptor
        since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "token": token}
        os.ftruncate(_held[path], 0)
        os.pwrite(_held[path], json.dumps(holder).encode(), 0)
        with contextlib.suppress(OSError):
            os.fsync(_held[path])  # so that other machines see it
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links that go in a circle
        reason = f"{error.strerror} ({error.filename or folder})" if isinstance(error, OSError) else str(error)
        return "", f"--output-dir {folder}: cannot be used: {reason}; choose another --output-dir"
    return token, ""


def _locked(descriptor: int, folder: Path) -> str:
    """Lock the open file; or what is in the way."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return f"{folder / LOCK}: is not a plain file; remove it or choose another --output-dir"
    try:
        without = try_lock(descriptor)
    except BlockingIOError:
        holder = _read(folder)
        return (
            f"--output-dir {folder}: is in use: process {holder.get('pid', 'unknown')} on "
            f"{holder.get('host', 'an unknown machine')} trains in it since {holder.get('since', 'an unknown time')}; "
            "wait for it or end it, or choose another --output-dir"
        )
    if without is not None:
        LOG.warning(
            f"{folder}: its file system has no locks ({without.strerror}): a second run that is started in this folder "
            "would not be noticed"
        )
    return ""


def _ranks_that_live(folder: Path) -> str:
    """Wait a little for the ranks of an earlier run to end; or what is in the way."""
    try:
        descriptor = os.open(folder / RANKS_LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:  # that run had one rank
        return ""
    try:
        for _ in range(_TRIES):
            try:
                try_lock(descriptor)  # where there are no locks, that was said
                return ""
            except BlockingIOError:
                time.sleep(_PAUSE_S)
    finally:
        os.close(descriptor)
    return (
        f"--output-dir {folder}: is in use: other ranks of a run whose rank 0 has ended still live, on this machine or "
        "another; end them, or choose another --output-dir"
    )


def _share(folder: Path) -> None:
    """Hold the folder as one of the other ranks."""
    with contextlib.suppress(OSError):
        path = folder.resolve()
        descriptor = os.open(path / RANKS_LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        _held[path] = descriptor
        try_lock(descriptor, shared=True)


def _why_another(folder: Path, token: str) -> str:
    """Why this is not the folder in whose lock the token stands; empty if it is."""
    why = ""
    for _ in range(_TRIES):
        try:
            found = _read(folder)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
        else:
            if found.get("token") == token:
                return ""
            why = f"its {LOCK} is another one"
        time.sleep(_PAUSE_S)
    return why


def _read(folder: Path) -> dict[str, Any]:
    descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        try:
            found = json.loads(file.read(_LONGEST) or b"{}")
        except (ValueError, RecursionError):
            found = None
    return found if isinstance(found, dict) else {}
