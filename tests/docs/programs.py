"""Programs that pages start: as a person would, and nothing of them is left afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from tests.docs.pages import ROOT
from tests.processes import members

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
