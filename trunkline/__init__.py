"""A scale-out training engine: DeepSpeed ZeRO first, FSDP2 as the fallback, Triton on the hot paths.

    from trunkline import Task, load_config, parse_config, train

docs/python.md shows their use. They are imported when they are named, since PyTorch takes seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trunkline.engine.task import Task
    from trunkline.launchers.api import Trained, load_config, parse_config, train

__all__ = ["Task", "Trained", "load_config", "parse_config", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("trunkline.engine.task" if name == "Task" else "trunkline.launchers.api"), name)
