"""flash_attention on a GPU at the sizes that it is for: long sequences, many elements, memory, the same bits twice."""

import pytest
import torch

from kernels import flash_attention
from kernels.reference import attention_reference
from tests.kernels.test_flash_attention_kernels import dense_in_the_same_dtype, deterministic, gradients, inputs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("N", "causal_block"), [(20136, 6712), (67120, 6712), (67120, 1), (30000, None)])
@pytest.mark.parametrize("D", [32, 64])
def test_long_sequences(N, causal_block, D):
    """Some rows of the output, and the gradients of those rows, against fp32."""
    device = torch.device("cuda")
    leaves = inputs(device, B=1, N=N, M=N, Hq=2, Hkv=1, D=D, dtype=torch.bfloat16)
    mask = torch.rand(1, N, generator=torch.Generator().manual_seed(1)) > 0.1
    mask[:, -N // 8 :] = False
    arguments = {"causal_block": causal_block, "key_mask": mask.to(device)}
    rows = [0, 127, 128, N // 2 - 1, N // 2, N - 129, N - 1]
    chosen = torch.zeros(1, N, 1, 1, device=device)
    chosen[:, rows] = 1
    upstream = torch.randn(1, N, 2, D, device=device) * chosen
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = (x.detach().to(dtype).requires_grad_() for x in leaves)
        if dtype == torch.bfloat16:
            out = flash_attention(q, k, v, **arguments)[:, rows]
            plain = dense_rows(dense_in_the_same_dtype, q, k, v, rows, causal_block, mask)
            results += [(x, *grad_of_rows(x, (q, k, v), upstream[:, rows])) for x in (out, plain)]
        else:
            truth = dense_rows(attention_reference, q, k, v, rows, causal_block, mask)
            results.append((truth, *grad_of_rows(truth, (q, k, v), upstream[:, rows])))
    for ours, plain, truth in zip(*results, strict=True):
        error, allowed = ((x.detach().float() - truth).abs().max() for x in (ours, plain))
        assert error <= 2 * allowed + 1e-5


def dense_rows(attention, q, k, v, rows, causal_block, mask):
    """Some rows of dense attention: each sees a stretch of the keys, so it is one call a row."""
    parts = []
    for i in rows:
        seen = k.shape[1] if causal_block is None else min(k.shape[1], (i // causal_block + 1) * causal_block)
        real = mask[:, :seen].to(q.device)
        parts.append(attention(q[:, i : i + 1], k[:, :seen], v[:, :seen], key_mask=real))
    return torch.cat(parts, dim=1)


def grad_of_rows(out, leaves, upstream):
    return torch.autograd.grad(out, leaves, upstream.to(out.dtype))


def test_deterministic_mode_repeats_bit_for_bit():
    leaves = inputs(torch.device("cuda"), N=2000, M=2000, Hq=4, Hkv=2, D=64, dtype=torch.bfloat16)
    with deterministic():
        out = flash_attention(*leaves, causal_block=671)
        first = gradients(out, leaves, retain_graph=True)
        for _ in range(5):
            assert all(torch.equal(a, b) for a, b in zip(first, gradients(out, leaves, retain_graph=True), strict=True))


def test_peak_memory_grows_linearly():
    """As counted in the module's docstring, within a tenth."""
    B, H, D = 1, 8, 64
    peaks = []
    for N in (33560, 67120):
        leaves = inputs(torch.device("cuda"), B=B, N=N, M=N, Hq=H, Hkv=H, D=D, dtype=torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        out = flash_attention(*leaves, causal_block=6712)
        out.backward(torch.ones_like(out))
        peaks.append(torch.cuda.max_memory_allocated())
        counted = 2 * 8 * N * H * D + 8 * B * N * H + 4 * N * H * D
        assert peaks[-1] < 1.1 * (counted + 2 * N * H * D)  # and the gradient of the output
        del leaves, out
    assert peaks[1] < 2.1 * peaks[0]


def test_more_than_two_to_the_31_elements():
    N, H, D = 66000, 256, 128
    q, k, v = (torch.randn(1, N, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    assert q.numel() > 2**31
    out = flash_attention(q, k, v, causal_block=128)[:, -200:, -3:]
    want = flash_attention(
        q[:, :, -3:].contiguous(), k[:, :, -3:].contiguous(), v[:, :, -3:].contiguous(), causal_block=128
    )
    torch.testing.assert_close(out, want[:, -200:], rtol=0, atol=0)
