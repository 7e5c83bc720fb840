"""Processes that make batches.

They leave signals to their parent. They end when it says so or is gone.

    DataLoader(..., multiprocessing_context=WORKERS)

A signal often reaches a whole process group: of `timeout`, a terminal, a batch system. The parent saves what was done
and needs its workers until then. They cannot tell another's TERM from their parent's, so the parent ends them by KILL.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from multiprocessing.process import BaseProcess

from trunkline.engine.machine.stopping import SIGNALS

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """From now on this process, which multiprocessing started, is killed when its parent ends, however that is."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid != os.getppid():  # it was gone before
        os._exit(1)


class _Popen(Popen):
    def terminate(self) -> None:
        self.kill()


class _Worker(ForkProcess):
    @staticmethod
    def _Popen(process_obj: BaseProcess) -> _Popen:  # noqa: N802  # multiprocessing's name for it
        return _Popen(process_obj)

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # what is blocked at a fork stays so in the child
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def run(self) -> None:
        end_with_parent()
        super().run()


class _Workers(ForkContext):
    Process = _Worker


WORKERS = _Workers()
