"""Programs that pages start: as a person would, and nothing of them is left afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tests.docs.pages import ROOT

ENVIRONMENT = os.environ | {
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "HF_HUB_OFFLINE": "1",
}


@contextmanager
def started(command: Sequence[str | Path], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A program in a session of its own; nothing of it is left afterwards."""
    given: dict[str, Any] = {"cwd": ROOT, "env": ENVIRONMENT} | options
    given["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a job in the background ignores
    process = subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, **given
    )
    try:
        yield process
    finally:
        for left in members(process.pid):
            with suppress(psutil.Error):
                left.kill()
        process.kill()
        process.communicate()


def members(session: int) -> list[psutil.Process]:
    """The processes of a session that live, and what they have started: torchrun's ranks have sessions of their own."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found |= {each.pid: each for each in (process, *process.children(recursive=True))}
    return list(found.values())


def wait_until(condition: Callable[[], Any], timeout_s: float = 600.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
