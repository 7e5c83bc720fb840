"""Requests to stop: TERM, INT, USR1, USR2, HUP, and the loss of the launcher.

    listen(status, advice)  the first thing that a program does, before the imports that take seconds
    with deferred(): ...    in here a request is only noted: look at `requested()` now and then, save, and end

After `listen`, and outside of `deferred`, a request ends the process at once, with one line. That is as safe as
kill -9, which leaves every file whole, and it works where an exception does not: in an import, or in a call that waits
for another rank. So a thread listens; Python's own handlers run only between two instructions of the main thread.

A signal that is ignored when listening begins stays ignored if it is HUP or INT: so `nohup` and shells ask for it. A
launcher that dies may leave its ranks behind. A rank therefore knows the torchrun or deepspeed processes that it
descends from, and takes the end of one for a request.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from trunkline.engine.errors import TrunklineError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
EXIT_CODE = 75
"""Of a run that was stopped and is worth resuming: EX_TEMPFAIL of sysexits.h, "try again later"."""

_MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP)
_LAUNCHERS = {"torchrun", "torch.distributed.run", "torch.distributed.launch", "deepspeed", "deepspeed.launcher.runner",
              "deepspeed.launcher.launch", "mpirun", "mpiexec", "mpiexec.hydra", "orterun", "prterun", "orted", "prted",
              "hydra_pmi_proxy", "slurmstepd"}  # fmt: skip
_LOOK_EVERY_S = 1.0

_reasons: list[str] = []  # appended to by a handler and by a thread, which needs no lock
_deferring = 0
_listener: _Listener | None = None


class InterruptedRunError(TrunklineError):
    """The run was asked to stop; what it had done is saved."""

    heading, status = "stopped", EXIT_CODE


def requested() -> str | None:
    """Who asked this process to stop, if anyone did since it listens: "SIGTERM"."""
    return _reasons[0] if _reasons else None


def request(reason: str) -> None:
    """Ask this process to stop."""
    _reasons.append(reason)


def listen(exit_code: int, advice: str) -> None:
    """Listen for requests from now on. Signals are heard only if this is the main thread, as Python demands.

    Args:
        exit_code, advice: how the process ends, and with which line after "stopped: by SIGTERM, ", if not `deferred`.
    """
    global _listener
    if _listener is None:
        _reasons.clear()
        _listener = _Listener(exit_code, advice)


def is_listening() -> bool:
    """Whether this process is a program that `listen` has made one, which may be ended."""
    return _listener is not None and _listener.ends


def listen_no_more() -> None:
    """Put the former handlers back."""
    global _listener, _deferring
    if _listener is not None:
        _listener.close()
        _reasons.clear()
    _listener, _deferring = None, 0


@contextmanager
def deferred() -> Iterator[None]:
    """Within, a request is noted and nothing else. A program that does not listen does so within, and no longer.

    After an error, or a request that was noted, one that listens still defers: it is on its way out, and a second
    request must not cut that short.
    """
    global _deferring, _listener
    _deferring += 1
    if _listener is not None:
        yield
        _deferring -= not _reasons
        return
    _reasons.clear()
    _listener = _Listener()
    try:
        yield
    finally:
        listen_no_more()


class _Listener:
    """Without an `exit_code` it notes requests and never ends the process."""

    def __init__(self, exit_code: int | None = None, advice: str = "") -> None:
        self._exit_code, self._advice = exit_code, advice
        self.ends = exit_code is not None
        self._handlers: dict[signal.Signals, Any] = {}
        self._woken_before: int | None = None
        self._launchers = _launchers()
        self._heard, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        threading.Thread(target=self._listen, name="stop requests", daemon=True).start()
        if threading.current_thread() is threading.main_thread():
            self._woken_before = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if handler is not signal.SIG_IGN or number not in _MAY_BE_IGNORED:
                    signal.signal(number, _note)
                    self._handlers[number] = handler

    def close(self) -> None:
        self._restore(self._woken_before)
        os.write(self._wake, b"\0")  # the thread ends, and closes the pipe

    def forget_in_a_child(self) -> None:
        """A forked child is not the one that is asked, and must be one that can be ended."""
        self._restore(-1)
        os.close(self._wake)
        os.close(self._heard)

    def _restore(self, wake: int | None) -> None:
        if wake is not None and self._woken_before is not None:
            signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python

    def _listen(self) -> None:
        while True:
            if select.select([self._heard], [], [], _LOOK_EVERY_S)[0]:
                numbers = os.read(self._heard, 64)
                if 0 in numbers:
                    os.close(self._heard)
                    os.close(self._wake)
                    return
                for number in self._handlers.keys() & set(numbers):  # Python writes all that it has a handler for
                    _note(number, None)
            elif not all(map(_is_alive, self._launchers)):
                self._launchers = []
                request("the loss of its launcher")
            if _reasons and not _deferring and self._exit_code is not None:
                rank = os.environ.get("RANK", "0")
                where = "" if rank == "0" else f"rank {rank}: "
                with suppress(OSError):
                    os.write(2, f"{where}stopped: by {_reasons[0]}, {self._advice}\n".encode())
                os._exit(self._exit_code)


def _note(number: int, _frame: Any) -> None:
    request(signal.Signals(number).name)


def _launchers() -> list[psutil.Process]:
    """The launchers among the processes that this one descends from. A shell is none: it may end before its jobs."""
    with suppress(psutil.Error, OSError):
        return [process for process in psutil.Process().parents() if _is_launcher(process)]
    return []


def launcher_commands() -> list[list[str]]:
    """The command lines of these launchers, the nearest first."""
    with suppress(psutil.Error, OSError):
        return [process.cmdline() for process in _launchers()]
    return []


def _is_launcher(process: psutil.Process) -> bool:
    with suppress(psutil.Error, OSError):
        if process.name() in _LAUNCHERS:  # slurmstepd writes its step into its command line
            return True
        words = [Path(word).name for word in process.cmdline() if not word.startswith("-")]
        return next((word for word in words if not word.startswith("python")), "") in _LAUNCHERS
    return False


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


# A child has the parent's handlers and pipe until it forgets them. A signal that comes to it before must wait, or the
# parent would take it for its own.
_masks = threading.local()


def _before_a_fork() -> None:
    _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _after_a_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _after_a_fork_in_the_child() -> None:
    global _listener
    if _listener is not None:
        _listener.forget_in_a_child()
        _listener = None
    _after_a_fork()


os.register_at_fork(before=_before_a_fork, after_in_parent=_after_a_fork, after_in_child=_after_a_fork_in_the_child)
