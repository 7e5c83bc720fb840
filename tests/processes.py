"""Processes that tests start: which of them live, and waiting for what they do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil


def members(session: int) -> list[psutil.Process]:
    """The processes of a session that live, and what they have started: torchrun's ranks have sessions of their own."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == session and _lives(process):
                found |= {each.pid: each for each in (process, *process.children(recursive=True)) if _lives(each)}
    return list(found.values())


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_until(condition: Callable[[], Any], timeout_s: float = 600.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
