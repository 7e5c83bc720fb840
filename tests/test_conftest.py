"""What a mark expression asks for: GPU tests run compiled, all others interpreted and without a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import selects_gpu_tests_alone


@pytest.mark.parametrize(
    "markexpr", ["gpu", "gpu and not slow", "not slow and gpu", "slow and gpu", "(gpu)", "not (not gpu or slow)"]
)
def test_an_expression_that_selects_gpu_tests_alone(markexpr):
    assert selects_gpu_tests_alone(markexpr)


@pytest.mark.parametrize(
    "markexpr",
    [
        "",
        "gpu and",
        "not slow and not gpu",
        "not  gpu",
        "not (gpu)",
        "slow",
        "slow or gpu",
        "not (gpu or slow)",
        "gpus",
    ],
)
def test_an_expression_that_selects_other_tests_too_or_alone(markexpr):
    assert not selects_gpu_tests_alone(markexpr)


def test_kernels_are_interpreted_also_where_a_conftest_of_other_tests_imports_them():
    paths = [
        "tests/models/token_image/test_levels.py",
        "tests/kernels/test_masked_mse_kernels.py::test_the_same_bits_in_every_run",
    ]
    pytest_ = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "same_bits"]
    run = subprocess.run([*pytest_, *paths], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stdout
