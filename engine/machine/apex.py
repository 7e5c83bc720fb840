"""Whose `apex` is installed, told without importing it.

PyPI's package of that name is an unrelated web toolkit.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Apex:
    """Whose `apex` Python would import: NVIDIA's, with or without its CUDA extensions, or something else."""

    owner: Literal["nvidia", "other"]
    folder: Path
    version: str
    has_cuda_extensions: bool


def find_apex() -> Apex | None:
    """The `apex` that is installed, or None. PyPI's package of that name is an unrelated web toolkit."""
    folder = _place("apex")
    if folder is None:
        return None
    # NVIDIA's has had these two since its first days, and the web toolkit has neither
    is_nvidia = all((folder / part).is_dir() for part in ("multi_tensor_apply", "optimizers"))
    try:
        version = importlib.metadata.version("apex")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return Apex("nvidia" if is_nvidia else "other", folder, version, _exists("amp_C"))


def _place(name: str) -> Path | None:
    """What the top-level package `name` would be imported from; finding it runs none of its code."""
    loaded = sys.modules.get(name)
    try:
        spec = loaded.__spec__ if loaded is not None else importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin) if spec.origin else None


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
