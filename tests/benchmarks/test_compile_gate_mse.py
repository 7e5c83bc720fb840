"""The kernels of squared errors compile for a Hopper GPU here, without one: no spills, loads of 16 bytes."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("some", "count"),
    [
        (r"(mask \[V\]|ward) bf16|no mask fp32|128 keys|column_sums", 2 + 2 + 2 + 1 + 1),
        pytest.param("", 25, marks=pytest.mark.slow),
    ],
)
def test_configurations_compile_within_their_limits(some, count):
    environment = os.environ | {"TRITON_INTERPRET": "0"}  # this process interprets
    command = [sys.executable, "-m", "trunkline.benchmarks.compile_gate_mse", "--architectures", "90", "--only", some]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == count


def test_a_spill_or_a_narrow_load_fails_the_gate():
    from trunkline.benchmarks.compile_gate_mse import Usage, configurations, limits_broken

    configuration = next(iter(configurations()))
    assert limits_broken(configuration, Usage(64, 0, configuration.wide_loads)) == []
    assert limits_broken(configuration, Usage(64, 8, 0)) == [
        "spills 8 bytes",
        f"0 loads of 16 bytes, not {configuration.wide_loads}",
    ]
