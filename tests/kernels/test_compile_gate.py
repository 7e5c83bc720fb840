"""The shipped tiles of flash_attention, compiled for sm_90 and sm_80 without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.compile_gate import Configuration, Usage, limits_broken

ROOT = Path(__file__).parents[2]


def gate(*arguments):
    """Run in a process of its own: in this one, Triton interprets."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.compile_gate", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout)
    return done


@pytest.mark.parametrize("architecture", ["sm_90", "sm_80"])
def test_a_tile_of_each_kind_fits_its_architecture(architecture):
    done = gate("--only", architecture)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(" registers, ") == 4 * 5


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["sm_90", "sm_80"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_every_tile_in_every_use_fits_its_architecture(architecture, dtype):
    done = gate("--every", "--only", f"{architecture} .* {dtype} ")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(" registers, ") == 5 * 6 * 3


@pytest.mark.parametrize(
    ("usage", "broken"),
    [
        (Usage(168, 0, 0, 227 * 1024, True, False), []),
        (Usage(255, 40, 0, 0, True, False), ["spills 40 bytes"]),
        (Usage(255, 0, 16, 0, True, False), ["spills 16 bytes"]),
        (Usage(168, 0, 0, 227 * 1024 + 1, True, False), ["needs 232449 bytes of shared memory"]),
        (Usage(168, 0, 0, 0, False, False), ["no wgmma"]),
        (Usage(168, 0, 0, 0, True, True), ["wgmma serialized"]),
    ],
)
def test_what_breaks_a_limit(usage, broken):
    assert limits_broken(Configuration(90, "forward", "bf16", 64, True, True), usage) == broken
