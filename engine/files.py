"""Files that are whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_UMASK = os.umask(0o022)
os.umask(_UMASK)


def replace_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a draft beside `path`, then put it in `path`'s place. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    write(draft)
    draft.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, whole or not at all. Raises OSError."""
    replace_whole(path, lambda draft: draft.write_text(json.dumps(value, indent=2) + "\n"))


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file that has the permissions of any other new file. Raises OSError."""
    try:
        save_file(tensors, path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:  # it wraps what the system said
        raise OSError(None, str(error), str(path)) from error
    path.chmod(0o666 & ~_UMASK)
