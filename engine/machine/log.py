"""What the engine says: the standard logger "trunkline", and whether progress bars are shown.

    LOG.info("resumed from ...")          a line of standard output
    LOG.warning("no such folder")         another: "warning: no such folder"
    LOG.error("the run hangs")            "error: the run hangs", on standard error
    tqdm(..., disable=bars_are_hidden())  a bar follows the logger's level

Unless a program has set them before, the logger has the level INFO and one handler, which prints the message alone, and
hands nothing to the root logger. So a run says the same with and without `logging.basicConfig`, and a program that
wants the lines elsewhere changes handlers, level or `propagate` as of any logger.
"""

from __future__ import annotations

import logging
import sys
from contextlib import suppress

from tqdm import tqdm

LOG = logging.getLogger("trunkline")


def bars_are_hidden() -> bool:
    """Whether the logger is silent about what is no warning."""
    return not LOG.isEnabledFor(logging.INFO)


class _Terminal(logging.Handler):
    """Prints around progress bars. What cannot be printed is dropped, as in output.py."""

    def emit(self, record: logging.LogRecord) -> None:
        heading = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        stream = sys.stdout if record.levelno < logging.ERROR else sys.stderr
        with suppress(OSError, ValueError, AttributeError):  # gone or full; closed; None
            tqdm.write(heading + self.format(record), file=stream)
            stream.flush()


if not LOG.handlers:
    LOG.addHandler(_Terminal())
    LOG.propagate = False
if LOG.level == logging.NOTSET:
    LOG.setLevel(logging.INFO)
