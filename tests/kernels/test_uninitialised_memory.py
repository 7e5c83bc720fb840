import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_memory_that_nobody_wrote_is_nan_in_these_tests(dtype: torch.dtype) -> None:
    x = torch.ones(3, dtype=dtype)
    for empty in (
        torch.empty(3, 5, dtype=dtype, requires_grad=True),
        torch.empty_like(x),
        torch.empty_strided((2, 2), (1, 2), dtype=dtype),
        x.new_empty(4),
        x.new_empty_strided((2, 2), (1, 2)),
    ):
        assert empty.isnan().all()


def test_integers_are_left_alone() -> None:
    assert torch.empty(3, dtype=torch.int64).dtype == torch.int64
