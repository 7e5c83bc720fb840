"""What is said where results cannot be written."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from trunkline.engine.machine.files import written_to


def test_an_input_error_is_no_lack_of_room() -> None:
    """Pictures and cases are read while results are written."""
    error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match="Input/output error") as raised, written_to(Path("out")):
        raise error
    assert raised.value is error
