"""Runs a function on several processes of this machine and hands back what each of them returned.

def sum_of_ranks(rank: int, world_size: int) -> float: ...       # at module level, so that it can be pickled

def test_sum() -> None:
    assert run_distributed_test(sum_of_ranks, 2) == [1.0, 1.0]
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import pickle
import secrets
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def run_distributed_test(
    fn: Callable[..., T],
    world_size: int,
    *args: Any,
    backend: str | None = "gloo",
    timeout_s: float = 120.0,
    environment: Mapping[str, str] | None = None,
) -> list[T]:
    """Call fn(rank, world_size, *args) on `world_size` new processes that share a process group; results by rank.

    Every process finds RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment,
    as under a launcher, and `environment` on top. With `backend=None` no process group is made: `fn` does that.
    `fn` and `args` must be picklable, and so must the results: fn at module level.

    Raises AssertionError with the traceback of the rank that failed first, or the number of one that was still running
    at `timeout_s`; the other ranks are killed then, since they may wait for it for ever.
    """
    context = fork_server()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        launcher = {
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "LOCAL_SIZE": str(world_size),  # DeepSpeed's; without, it starts a process twice a step of ZeRO 3 to ask
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(find_free_port()),
        }
        ranks = [
            context.Process(
                target=_run_rank,
                args=(fn, rank, world_size, args, backend, {**os.environ, **launcher, **(environment or {})}, folder),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            running = _wait(ranks, timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        return _results(ranks, running, Path(folder), timeout_s)


def fork_server() -> multiprocessing.context.ForkServerContext:
    """Where processes come from that have torch and DeepSpeed imported already: once, instead of seconds each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    return context


def find_free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago.

    Those that the kernel gives to connections, 32768 and above, are left to them: one would be taken in between.
    """
    while True:
        port = secrets.randbelow(12_000) + 16_000  # seeds of tests do not reach it
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def _wait(ranks: list[ForkServerProcess], timeout_s: float) -> set[int]:
    """Until all ranks are done, one has failed (and the others had two seconds to fail as well), or time is up.

    Returns the ranks that are running still.
    """
    deadline = time.monotonic() + timeout_s
    failed = False
    while time.monotonic() < deadline and any(process.is_alive() for process in ranks):
        if not failed and any(process.exitcode not in (None, 0) for process in ranks):
            failed, deadline = True, min(deadline, time.monotonic() + 2.0)
        time.sleep(0.01)
    return {rank for rank, process in enumerate(ranks) if process.is_alive()}


def _results(ranks: list[ForkServerProcess], running: set[int], folder: Path, timeout_s: float) -> list[Any]:
    results: list[Any] = []
    failures: list[tuple[float, str]] = []
    for rank, process in enumerate(ranks):
        outcome = folder / f"{rank}.pickle"
        if not outcome.exists():
            ended = f"was still running after {timeout_s:g} s" if rank in running else "died"
            failures.append((math.inf, f"rank {rank} {ended} (exit code {process.exitcode})"))
            continue
        failed_at, value = pickle.loads(outcome.read_bytes())
        if failed_at is None:
            results.append(value)
        else:
            failures.append((failed_at, f"rank {rank} failed:\n{value}"))
    if failures:
        raise AssertionError(min(failures)[1])
    return results


def _run_rank(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    args: tuple[Any, ...],
    backend: str | None,
    environment: dict[str, str],
    folder: str,
) -> None:
    os.environ.clear()  # the fork server's environment is the one of its first start
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    outcome = Path(folder, f"{rank}.pickle")
    try:
        if backend is not None:
            dist.init_process_group(backend)
        result = pickle.dumps((None, fn(rank, world_size, *args)))
        if dist.is_initialized():
            dist.barrier()  # nobody takes the store away while another still talks to it
            dist.destroy_process_group()
    except BaseException:
        outcome.write_bytes(pickle.dumps((time.monotonic(), traceback.format_exc())))
        raise SystemExit(1) from None
    outcome.write_bytes(result)
