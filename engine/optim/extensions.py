"""Extensions that are compiled on first use, as some of DeepSpeed's optimizers are.

The compilation is announced. A lock that a dead process left is named.

PyTorch locks the folder of an extension with a file that a killed compilation leaves behind, and waits for it without
end. Whoever compiles holds that file open, so a lock that nobody has open is stale.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trunkline.engine.config.deepspeed_section import DeepSpeedSection
from trunkline.engine.errors import ConfigError
from trunkline.engine.machine.log import LOG

_QUIET_S = 4.0
"""How long a folder whose lock nobody has open may stay as it is."""


def check_compiler(section: DeepSpeedSection, device: torch.device) -> None:
    """Raise ConfigError if DeepSpeed cannot build the optimizer here: a package, a GPU or a compiler is missing."""
    optimizer, where = section.optimizer, "deepspeed.optimizer.type"
    kind, offloaded = optimizer.type.lower(), section.zero_optimization.offloads
    if not optimizer.is_deepspeed_only or (kind == "muon" and optimizer.params.get("torch_adam")):
        return
    if kind in ("muadam", "muadamw", "musgd"):
        if importlib.util.find_spec("mup") is None:
            raise ConfigError(f"{where}: {optimizer.type} needs the package mup: install it, or use AdamW")
        return
    if device.type == "cpu" and (kind == "lamb" or (kind == "lion" and not offloaded)):
        raise ConfigError(f"{where}: DeepSpeed has {optimizer.type} for GPUs only; use AdamW")
    name = {"lamb": "fused_lamb", "lion": "cpu_lion" if offloaded else "fused_lion"}.get(
        kind, "cpu_adam" if offloaded else "fused_adam"
    )
    if _installed(name):
        return
    needed = ["ninja"]
    if not _built(name):
        needed.append(os.environ.get("CXX", "c++"))
        if device.type == "cuda" and "CUDA_HOME" not in os.environ:
            needed.append("nvcc")
    if missing := [command for command in needed if shutil.which(command) is None]:
        raise ConfigError(
            f"{where}: {optimizer.type} is compiled on first use, for which {' and '.join(missing)} cannot be found: "
            "install it, or use AdamW, which needs no compiler"
        )


def _installed(name: str) -> bool:
    try:
        from deepspeed.git_version_info import installed_ops
    except ImportError:  # as where a run is only planned
        return False
    return bool(installed_ops.get(name))


def _built(name: str) -> bool:
    from torch.utils import cpp_extension

    return (Path(cpp_extension._get_build_directory(name, False)) / f"{name}.so").exists()


@contextlib.contextmanager
def compilation_watched(is_main: bool) -> Iterator[None]:
    """Within, an extension that has to be compiled is announced, and a failure or a stale lock is a ConfigError."""
    from torch.utils import cpp_extension
    from torch.utils.file_baton import FileBaton

    def load(name: str, *arguments: Any, **options: Any) -> Any:
        if is_main and not _built(name):
            folder = cpp_extension._get_build_directory(name, False)
            LOG.info(f"compiling DeepSpeed's {name} for its first use, into {folder}: this takes minutes, once")
        try:
            return torch_load(name, *arguments, **options)
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            raise ConfigError(
                f"DeepSpeed's {name} cannot be compiled: {str(error).splitlines()[0]}; the compiler's messages stand "
                "above. Mend what they name, or use the optimizer AdamW, which needs no compiler"
            ) from error

    torch_load, torch_wait = cpp_extension.load, FileBaton.wait
    cpp_extension.load = load
    FileBaton.wait = lambda baton: _wait(Path(baton.lock_file_path))  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        cpp_extension.load, FileBaton.wait = torch_load, torch_wait  # type: ignore[method-assign]


def _wait(lock: Path) -> None:
    """Until the lock is gone. Raises ConfigError if it is stale."""
    seen, since = _changes(lock.parent), time.monotonic()
    while lock.exists():
        time.sleep(0.5)
        now = _changes(lock.parent)
        if now != seen or _is_open(lock):
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > _QUIET_S - 0.5:
            raise ConfigError(
                f"{lock}: a compilation that was killed left this file behind; no process here has it open, and "
                "nothing beside it changes. Delete it and start again, unless another machine compiles into this folder"
            )


def _changes(folder: Path) -> float:
    with contextlib.suppress(OSError):  # a file may go while it is looked at
        return max((entry.stat().st_mtime for entry in folder.iterdir()), default=0.0)
    return 0.0


def _is_open(path: Path) -> bool:
    """Whether a process of this machine that may be looked at has the file open."""
    target = str(path.resolve())
    for entry in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(entry) == target:
                return True
    return False
