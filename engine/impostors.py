"""Packages of the same name as ours, or as one that we look for, told apart without importing them.

own_packages()       where Python would take `engine`, `kernels` and `models` from
refuse_shadowed()    raises ConfigError if one of them is another project's
find_apex()          whose `apex` is installed, if any
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
"""The folder that holds our packages."""

INSTALL = "pip install -c constraints.txt -e ."


@dataclass(frozen=True)
class Package:
    """Where `import name` leads from here. `place` is a folder or a file, or None if it leads nowhere."""

    name: str
    place: Path | None
    is_ours: bool
    remedy: str


def own_packages() -> list[Package]:
    """What Python would import under our packages' names.

    `kernels` is also a package of Hugging Face, and other projects have an `engine` or a `models` of their own.
    """
    return [_examine(name) for name in ("engine", "kernels", "models")]


def _examine(name: str) -> Package:
    place, ours = _place(name), ROOT / name
    if place is None:
        return Package(name, None, False, f"install Trunkline into this Python: {INSTALL}")
    hugging_face = hugging_face_kernels() if name == "kernels" else None
    if place.resolve() == ours and not (hugging_face and hugging_face.place == ours):
        return Package(name, place, True, "")
    owner = f"Hugging Face's `kernels` {hugging_face.version}" if hugging_face else f"another project's `{name}`"
    path = f"PYTHONPATH={ROOT}, which hides the other one"
    return Package(name, place, False, f"{owner} hides Trunkline's: pip uninstall {name}, or set {path}")


def refuse_shadowed() -> None:
    """Raise ConfigError if one of our packages is hidden by another project's of the same name."""
    for package in own_packages():
        if not package.is_ours:
            raise ConfigError(f"`import {package.name}` leads to {package.place or 'nothing'}; {package.remedy}")


@dataclass(frozen=True)
class HuggingFaceKernels:
    """Hugging Face's package `kernels`: its version and its folder."""

    version: str
    place: Path


def hugging_face_kernels() -> HuggingFaceKernels | None:
    """Hugging Face's `kernels` if it is installed, whichever package of that name Python would import."""
    try:
        installed = importlib.metadata.distribution("kernels")
    except importlib.metadata.PackageNotFoundError:
        return None
    return HuggingFaceKernels(installed.version, Path(str(installed.locate_file("kernels"))).resolve())


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
