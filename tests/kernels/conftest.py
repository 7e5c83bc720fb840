"""What the kernels' tests share: `interpreter`, for a module that runs Triton kernels on the CPU."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator

import pytest
import torch

import kernels
from kernels import triton_path


@pytest.fixture(scope="module")
def interpreter() -> Iterator[None]:
    """Run the kernels through Triton's interpreter on CPU tensors while this module's tests run.

    Triton decides at a kernel's decoration whether it interprets, so the modules are loaded again with
    TRITON_INTERPRET=1, and once more without it at the end. A module loaded again keeps its dictionary: functions that a
    test has imported before see the new kernels.
    """
    if triton_path.triton is None:
        pytest.skip("needs Triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        _reload_kernels()
        yield
    _reload_kernels()
    torch.compiler.reset()


def _reload_kernels() -> None:
    importlib.reload(triton_path)
    for _ in range(2):  # twice, since a kernel may call one that a later module defines
        for module in pkgutil.iter_modules(kernels.__path__, "kernels."):
            if module.name in sys.modules and module.name != triton_path.__name__:
                importlib.reload(sys.modules[module.name])
