"""The backward pass of flash_attention for Hopper GPUs: on one, with `-m gpu`, against dense torch, as shipped."""

import pytest
import torch

from tests.kernels.attention.test_flash_kernels import assert_as_accurate_as_dense_torch, inputs, some_keys
from trunkline.kernels.attention import flash_attention, hopper
from trunkline.kernels.attention.hopper import hopper_backward
from trunkline.kernels.attention.tiles import HOPPER_BACKWARD

DEVICE = torch.device("cuda")
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture
def served(monkeypatch):
    """Nothing is tested where another kernel would run."""
    monkeypatch.setattr(hopper, "FEWEST_ROWS", 1)
    monkeypatch.setattr(hopper, "FEWEST_TILES", 1)
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    for head_dim in HOPPER_BACKWARD:
        q = torch.empty(1, 1, 1, head_dim, dtype=BF16, device=DEVICE)
        assert hopper_backward(q, q, deterministic=False) is not None
        assert hopper_backward(q, q, deterministic=True) is None
        assert hopper_backward(q.expand(-1, -1, 2, -1), q, deterministic=False) is None


@pytest.mark.gpu
@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("D", HOPPER_BACKWARD)
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize(
    ("N", "M", "causal_block", "masked"),
    [
        (1000, 1000, 123, True),
        (300, 517, None, False),
        (517, 300, 64, True),
        (333, 500, 1, True),
        (1, 1, 1, False),
        (500, 700, 63, False),
        (200, 200, None, True),
    ],
)
def test_every_pattern(D, dtype, N, M, causal_block, masked):
    """Walks start at rows of every remainder modulo 4; some keys lie in a program whose others are seen earlier."""
    mask = some_keys(2, M, DEVICE) if masked else None
    leaves = inputs(DEVICE, B=2, N=N, M=M, Hq=3, Hkv=3, D=D, dtype=dtype)
    assert_as_accurate_as_dense_torch(leaves, causal_block=causal_block, key_mask=mask)


@pytest.mark.gpu
@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("D", HOPPER_BACKWARD)
def test_what_nobody_sees_may_be_nan(D):
    """Padding keys, and rows that see none of the others."""
    N, block = 700, 123
    mask = torch.rand(1, N, generator=torch.Generator().manual_seed(3)) > 0.3
    mask[:, :block], mask[:, 128:192], mask[:, 320:450] = False, False, True
    mask = mask.to(DEVICE)
    clean = inputs(DEVICE, B=1, N=N, M=N, Hq=2, Hkv=2, D=D, dtype=BF16)
    dirty = [x.detach().clone() for x in clean]
    dirty[0][:, :block] = float("nan")
    for x in dirty[1:]:
        x[~mask] = float("nan")
    upstream = torch.randn_like(clean[0])
    results = []
    for leaves in (clean, [x.requires_grad_() for x in dirty]):
        out = flash_attention(*leaves, causal_block=block, key_mask=mask)
        results.append([out, *torch.autograd.grad(out, leaves, upstream)])
        upstream = upstream.clone()
        upstream[:, :block] = float("nan")
    for ours, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-4)  # dQ is summed in any order


@pytest.mark.gpu
@pytest.mark.usefixtures("served")
@pytest.mark.parametrize("D", HOPPER_BACKWARD)
def test_views_and_expanded_inputs(D):
    packed = torch.randn(2, 300, 2, 3, D, dtype=BF16, device=DEVICE)
    q, k, _ = (x.detach().requires_grad_() for x in packed.unbind(3))
    v = torch.randn(2, 300, 1, D, dtype=BF16, device=DEVICE).expand(2, 300, 2, D).requires_grad_()
    upstream = torch.randn(1, 1, 1, D, dtype=BF16, device=DEVICE).expand(q.shape)
    ours, expected = (
        torch.autograd.grad(flash_attention(*leaves, causal_block=100), leaves, gradient)
        for leaves, gradient in (
            ([q, k, v], upstream),
            ([x.detach().contiguous().requires_grad_() for x in (q, k, v)], upstream.contiguous()),
        )
    )
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-4)
