"""flash_attention on a GPU at the sizes that it is for: long sequences, many elements, memory, the same bits twice."""

import gc

import pytest
import torch

from tests.kernels.attention.test_flash_kernels import (
    assert_as_accurate_as_dense_torch,
    dense_in_the_same_dtype,
    deterministic,
    gradients,
    inputs,
    some_keys,
)
from trunkline.kernels.attention import flash, flash_attention, hopper, op
from trunkline.kernels.reference import attention_reference

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def hopper_kernels_serve_few_heads_too(monkeypatch):
    monkeypatch.setattr(hopper, "FEWEST_TILES", 1)


@pytest.mark.parametrize(
    ("N", "causal_block", "D", "dtype", "Hkv"),
    [
        *((20136, 6712, D, BF16, 2) for D in (32, 64)),
        *(
            (N, block, D, BF16, 1)
            for N, block in ((20136, 6712), (67120, 6712), (67120, 1), (30000, None))
            for D in (32, 64)
        ),
        (67120, 6712, 64, FP16, 1),
        (30000, None, 32, FP16, 1),
        (20136, 6712, 64, FP32, 1),
        (30000, 1, 32, FP32, 1),
    ],
)
def test_long_sequences(N, causal_block, D, dtype, Hkv):
    leaves = inputs(DEVICE, B=1, N=N, M=N, Hq=2, Hkv=Hkv, D=D, dtype=dtype)
    mask = torch.rand(1, N, generator=torch.Generator().manual_seed(1)) > 0.1
    mask[:, -N // 8 :] = False
    rows = [0, 127, 128, N // 2 - 1, N // 2, N - 129, N - 1]
    assert_rows_as_accurate_as_dense_torch(
        leaves, rows, slice(None), causal_block=causal_block, key_mask=mask.to(DEVICE)
    )


@pytest.mark.large
def test_more_than_two_to_the_31_elements():
    """Rows of the last heads, most of which lie beyond, in tensors by rows and in sums by heads."""
    N, H, D = 66000, 256, 128
    torch.cuda.empty_cache()
    free_gib, needed_gib = torch.cuda.mem_get_info()[0] / 2**30, 50
    if free_gib < needed_gib:
        pytest.skip(f"needs {needed_gib} GiB of GPU memory; {free_gib:.0f} are free")
    leaves = [torch.randn(1, N, H, D, device=DEVICE, dtype=BF16).requires_grad_() for _ in range(3)]
    assert leaves[0].numel() > 2**31
    rows = [65535, 65536, 65663, 65664, 65791, N - 129, N - 1]
    assert_rows_as_accurate_as_dense_torch(leaves, rows, slice(H - 3, H), causal_block=128)


def assert_rows_as_accurate_as_dense_torch(leaves, rows, heads, causal_block=None, key_mask=None):
    """Some rows of some heads, and the gradients that they pass on, which are none of any other row and head.

    Dense torch takes each row on its own, which sees a stretch of the keys. The truth is in fp64.
    """
    few = [x.detach()[:, :, heads].clone() for x in leaves]
    shape = (1, len(rows), few[0].shape[2], few[0].shape[3])
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(few[0])
    plain, truth = (
        rows_of_dense_torch(
            attention, [x.to(dtype).requires_grad_() for x in few], rows, upstream, causal_block, key_mask
        )
        for attention, dtype in ((dense_in_the_same_dtype, few[0].dtype), (attention_reference, torch.float64))
    )
    out = flash_attention(*leaves, causal_block=causal_block, key_mask=key_mask)
    everywhere = torch.zeros_like(out)
    everywhere[:, rows, heads] = upstream
    for mode in (False, True):
        with deterministic(mode):
            dq, dk, dv = torch.autograd.grad(out, leaves, everywhere, retain_graph=not mode)
        ours = (out.detach()[:, rows, heads], dq[:, :, heads], dk[:, :, heads], dv[:, :, heads])
        for x, usual, true in zip(ours, plain, truth, strict=True):
            error, allowed = ((y - true).abs().max() for y in (x, usual))
            rounding = torch.finfo(x.dtype).eps * true.abs().max()  # for where dense torch happens to be exact
            assert error <= 2 * allowed + rounding + 1e-5
        assert dq.count_nonzero() == dq[:, rows, heads].count_nonzero()
        assert dk.count_nonzero() == dk[:, :, heads].count_nonzero()
        assert dv.count_nonzero() == dv[:, :, heads].count_nonzero()
        del dq, dk, dv, ours


def rows_of_dense_torch(attention, leaves, rows, upstream, causal_block, key_mask):
    """Those rows of the output, and the gradients of q, k and v."""
    q, k, v = leaves
    parts = []
    for i in rows:
        seen = k.shape[1] if causal_block is None else min(k.shape[1], (i // causal_block + 1) * causal_block)
        real = None if key_mask is None else key_mask[:, :seen]
        parts.append(attention(q[:, i : i + 1], k[:, :seen], v[:, :seen], key_mask=real))
    out = torch.cat(parts, dim=1)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))


def test_deterministic_mode_repeats_bit_for_bit():
    leaves = inputs(DEVICE, N=2000, M=2000, Hq=4, Hkv=2, D=64, dtype=BF16)
    with deterministic():
        out = flash_attention(*leaves, causal_block=671)
        first = gradients(out, leaves, retain_graph=True)
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(first, gradients(out, leaves, retain_graph=True), strict=True))


@pytest.mark.parametrize("D", [32, 64])
def test_compiles_and_is_a_proper_operator_at_the_hopper_kernels_sizes(D):
    torch.compiler.reset()
    N, block = 2000, 671
    leaves = inputs(DEVICE, N=N, M=N, Hq=2, Hkv=2, D=D, dtype=BF16)
    mask = some_keys(2, N, DEVICE)
    compiled = torch.compile(flash_attention, fullgraph=True)
    out, want = (call(*leaves, causal_block=block, key_mask=mask) for call in (compiled, flash_attention))
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    for got, expected in zip(gradients(out, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02 * expected.abs().max().item())
    torch.library.opcheck(op.forward.operator, (*(x.detach() for x in leaves), mask, block, D**-0.5))


def test_peak_memory_grows_linearly():
    """As counted in the module's docstring, within a tenth."""
    B, H, D = 1, 8, 64
    peaks = []
    for N in (33560, 67120):
        gc.collect()
        before = torch.cuda.memory_allocated()
        leaves = inputs(DEVICE, B=B, N=N, M=N, Hq=H, Hkv=H, D=D, dtype=BF16)
        torch.cuda.reset_peak_memory_stats()
        out = flash_attention(*leaves, causal_block=6712)
        out.backward(torch.ones_like(out))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        R = S = B * N * H * D
        assert peaks[-1] < 1.1 * (2 * (4 * R + 4 * S) + 8 * B * N * H + 4 * R)
        del leaves, out
    assert peaks[1] < 2.1 * peaks[0]


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("causal_block", [None, 1, 1000])
@pytest.mark.parametrize(("N", "Hkv", "D"), [(1, 4, 64), (300, 2, 40), (1000, 1, 128)])
@pytest.mark.parametrize(("border", "value"), [("ROWS_PER_CHANNEL", 32), ("PRODUCTS", 2**34), ("WIDEST", 16)])
def test_torch_s_own_kernels_serve_what_they_are_faster_for(border, value, N, Hkv, D, causal_block, dtype, monkeypatch):
    monkeypatch.setattr(flash, border, value)
    monkeypatch.setattr(op.FlashAttention, "apply", None)
    leaves = inputs(DEVICE, N=N, M=N, Hq=4, Hkv=Hkv, D=D, dtype=dtype)
    assert_as_accurate_as_dense_torch(leaves, causal_block=causal_block)
    with deterministic(), pytest.raises(TypeError):
        flash_attention(*leaves, causal_block=causal_block)
