"""Imports the kernels so that Triton's interpreter can run them, in a process of pytest and in the fork server."""

from __future__ import annotations

import importlib

import pytest


def import_interpreted() -> None:
    """Import Triton and the kernels for its interpreter.

    Triton looks for TRITON_INTERPRET when it is imported and where a kernel is decorated, so both happen here. Kernels
    take CPU tensors only under the fixtures of tests/kernels; programs that tests start know nothing of it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        triton_path = importlib.import_module("trunkline.kernels.triton_path")
        for kernels in ("attention", "attention.relative", "column_sums", "linear_masked_mse", "masked_mse"):
            importlib.import_module(f"trunkline.kernels.{kernels}")
    triton_path.INTERPRETED = False
