"""FlashAttention as torch sees it: compiled, as a registered operator, recomputed and under autocast."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.kernels.attention.test_flash_kernels import (
    deterministic,
    gradients,
    inputs,
    small_tiles,  # noqa: F401  # which every test here works in
    some_keys,
)
from trunkline.kernels.attention import flash_attention, op


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_without_graph_breaks(device, masked):
    torch.compiler.reset()
    leaves = inputs(device, M=14)
    mask = some_keys(2, 14, device) if masked else None
    compiled = torch.compile(flash_attention, fullgraph=True)
    want = flash_attention(*leaves, causal_block=4, key_mask=mask)
    out = compiled(*leaves, causal_block=4, key_mask=mask)
    torch.testing.assert_close(out, want)
    for got, expected in zip(gradients(out, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_is_a_proper_operator_of_torch(device, masked):
    q, k, v = (x.detach() for x in inputs(device, N=10, M=14))
    pattern = some_keys(2, 14, device) if masked else None, 4, 0.25
    torch.library.opcheck(op.forward.operator, (q, k, v, *pattern))
    out, lse = op.forward(q, k, v, *pattern)
    checks = ("test_schema", "test_faketensor")  # its sums have no order on a GPU
    torch.library.opcheck(op.backward.operator, (out, q, k, v, out, lse, *pattern), test_utils=checks)


def test_activation_checkpointing_changes_nothing(device):
    leaves = inputs(device, N=20, M=20)
    call = lambda q, k, v: flash_attention(q, k, v, causal_block=4)  # noqa: E731
    with deterministic():
        want = gradients(call(*leaves), leaves)
        got = gradients(checkpoint(call, *leaves, use_reentrant=False), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_takes_part_in_autocast(device):
    leaves = inputs(device, N=20, M=20)
    with torch.autocast(device.type, torch.bfloat16):
        out = flash_attention(leaves[0], leaves[1].bfloat16(), leaves[2])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, flash_attention(*(x.bfloat16() for x in leaves)), rtol=0, atol=0)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), leaves))
