"""How every launcher begins and ends: signals are heard, printing ends nothing, an error is a message and a status.

    def main(argv=None) -> int:
        return status_of(lambda: ...)      in any process

    if __name__ == "__main__":             a program
        begin()
        sys.exit(main())                   or leave(main()), of one that may be one of several ranks

So that signals are heard early and --help is quick, a launcher imports what takes seconds within its functions.
"""

from __future__ import annotations

import atexit
import errno
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from trunkline.engine.errors import TrunklineError
from trunkline.engine.machine.output import keep_printing

INTERRUPTED = 130
AGAIN = "run the same command again"
_last_status: list[int] = []


def begin(*streams: str, exit_code: int = INTERRUPTED, advice: str = AGAIN) -> None:
    """Be a program from now on: see trunkline.engine.machine.output and stopping."""
    from trunkline.engine.machine.stopping import listen  # needs psutil, which status_of can do without

    atexit.register(_end_at_once)  # before all others, so it is called after them
    keep_printing(*streams)
    listen(exit_code, advice)
    if sys.path and os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
        del sys.path[0]  # `import evaluate` is to find Hugging Face's, not the launcher


def leave(status: int) -> NoReturn:
    """End the program that `begin` began, as sys.exit does: threads are waited for, and atexit's functions are called.

    One of several ranks then ends at once. Python's own end would tear down gloo's threads while they still work, and
    now and then one of them aborts the process: status -6 in place of 0, or of the 75 that a cluster resumes.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _last_status.append(status)
    sys.exit(status)


def _end_at_once() -> None:
    if _last_status:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # gone or full; closed; None
                stream.flush()
        os._exit(_last_status[0])


def status_of(command: Callable[[], int | None], on_error: Callable[[Exception], None] = lambda error: None) -> int:
    """Call `command`. Returns its exit status, or that of the error that it raises, which is printed as one message.

    A TrunklineError says its status: 2, or 75 for a run that was stopped. An OSError that names a file, or says that
    there is no room, is a user's too.
    on_error: is called with every error, also with one of the program, which is raised
    """
    try:
        status = command() or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # who reads has enough, as `| head` has: no mistake, and what a shell calls it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains when it ends
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print(f"interrupted: {AGAIN}", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        mistake = _as_mistake(error)
        if mistake is not None:
            rank = os.environ.get("RANK", "0")
            where = f"rank {rank}: " if rank != "0" else ""  # an error may be one rank's alone, so each says its own
            print(f"{where}{mistake.heading}: {mistake}", file=sys.stderr, flush=True)
        on_error(error)
        if mistake is None:
            raise
        try:
            sys.stdout.flush()
        except (OSError, ValueError, AttributeError):  # full; closed; None
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains when it ends
        return mistake.status


def _as_mistake(error: Exception) -> TrunklineError | None:
    """The error as one that a person can act on, or None."""
    if isinstance(error, OSError) and error.filename is not None:
        return TrunklineError(f"{error.filename}: {error.strerror}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return TrunklineError(f"standard output, or a file that is written: {error.strerror}: make room")
    return error if isinstance(error, TrunklineError) else None
