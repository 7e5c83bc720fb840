"""The backward pass for sm_90 in Gluon compiles here, without a GPU, within its limits."""

import os
import subprocess
import sys

import pytest

from trunkline.kernels.attention.tiles import HOPPER_BACKWARD

pytest.importorskip("triton")


@pytest.mark.parametrize(("some", "uses"), [(r"bf16 .* causal\+mask", 1), pytest.param("", 8, marks=pytest.mark.slow)])
def test_tiles_compile_within_their_limits(some, uses):
    environment = os.environ | {"TRITON_INTERPRET": "0"}  # this process interprets
    command = [sys.executable, "-m", "trunkline.benchmarks.compile_gate_backward_hopper", "--only", some]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == uses * len(HOPPER_BACKWARD)
