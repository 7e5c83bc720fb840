"""The kernels of relative_attention, compiled for two architectures without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from trunkline.benchmarks.compile_gate_relative import HEAD_DIMS, Configuration, Usage, limits_broken

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (["--only", "bf16 D=64 "], 2 * 3),
        pytest.param([], 2 * 3 * 2 * len(HEAD_DIMS), marks=pytest.mark.slow),
        pytest.param(["--every"], 2 * 3 * 3 * len(HEAD_DIMS) * 8, marks=pytest.mark.hours),
    ],
)
def test_tiles_compile_within_their_limits(arguments: list[str], count: int) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0"}  # this process interprets
    command = [sys.executable, "-m", "trunkline.benchmarks.compile_gate_relative", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" registers, ") == count


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, []),
        ({"spilled_bytes": 104}, ["spills 104 bytes"]),
        ({"spills_in_loop": 10}, ["spills 16 bytes"]),
        ({"loop": 0}, ["spills 16 bytes"]),
        ({"shared_bytes": 99 * 1024 + 1}, ["needs 101377 bytes of shared memory"]),
        ({"tensor_cores": False}, ["no tensor cores"]),
        ({"wide_loads": 13}, ["13 loads of 16 bytes, not 14"]),
    ],
)
def test_what_breaks_a_limit(change: dict[str, Any], broken: list[str]) -> None:
    usage = Usage(255, 16, 9, 99 * 1024, True, 14, 1000)._replace(**change)
    assert limits_broken(Configuration(80, "backward_dq", "bf16", 64), usage) == broken
