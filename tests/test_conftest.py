"""What a mark expression asks for: GPU tests run compiled, all others interpreted and without a GPU."""

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
