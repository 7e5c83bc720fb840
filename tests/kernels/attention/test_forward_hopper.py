"""The forward pass in Gluon: where it is chosen, and on a Hopper GPU, beside the plain kernel, that it is right."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.kernels.attention.test_flash_kernels import dense_in_the_same_dtype
from trunkline.kernels.attention import flash_attention, op
from trunkline.kernels.attention import hopper as hopper_module
from trunkline.kernels.attention.forward import launch_forward
from trunkline.kernels.attention.hopper import FEWEST_ROWS, FEWEST_TILES, hopper_forward, hopper_kernels
from trunkline.kernels.attention.tiles import HOPPER_FORWARD
from trunkline.kernels.reference import attention_reference, visible_pairs
from trunkline.kernels.triton_path import triton

ROOT = Path(__file__).parents[3]
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def asked_anew():
    hopper_kernels.cache_clear()
    yield
    hopper_kernels.cache_clear()


@pytest.fixture
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    return torch.device("cuda")


def test_a_triton_that_they_were_written_for_has_them():
    """In a process of its own: in this one, Triton interprets."""
    pytest.importorskip("triton")
    command = (
        "from trunkline.kernels.attention.hopper import hopper_kernels; print(*(x.__name__ for x in hopper_kernels()))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert done.stdout.strip() == "launch_forward_hopper launch_backward_hopper"


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0.0"])
def test_another_triton_goes_without(version, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(hopper_module, "INTERPRETED", False)
    monkeypatch.setattr(triton, "__version__", version)
    assert hopper_kernels() is None


def test_a_triton_without_gluon_goes_without(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(hopper_module, "INTERPRETED", False)
    for kernel in ("forward_hopper", "backward_hopper", "hopper_memory"):
        monkeypatch.delitem(sys.modules, f"trunkline.kernels.attention.{kernel}", raising=False)
    monkeypatch.setitem(sys.modules, "triton.experimental", None)
    assert hopper_kernels() is None


def tensors(device, D, B=1, N=1000, M=None, Hq=2, Hkv=1, dtype=BF16, scale=1.0):
    generator = torch.Generator().manual_seed(D)
    shapes = ((B, N, Hq, D), (B, M or N, Hkv, D), (B, M or N, Hkv, D))
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return q * scale, k, v


def padding(device, B, M, share=0.3):
    """With whole, partly padded and wholly padded tiles."""
    mask = torch.rand(B, M, generator=torch.Generator().manual_seed(1)) > share
    mask[0, M // 8 : M // 2] = True
    mask[-1, M // 2 : M - M // 8] = False
    return mask.to(device)


@pytest.mark.gpu
@pytest.mark.parametrize("D", HOPPER_FORWARD)
@pytest.mark.parametrize("causal_block", [None, 1, 63, 123, 1000])
def test_any_pattern_and_length(hopper, D, causal_block):
    for N, M in ((2000, 2000), (517, 901), (901, 517), (1, 1), (193, 129)):
        q, k, v = tensors(hopper, D, B=2, N=N, M=M, Hq=4, Hkv=2)
        assert_both_kernels_are_right(q, k, v, None, causal_block)
        assert_both_kernels_are_right(q, k, v, padding(hopper, 2, M), causal_block)


@pytest.mark.gpu
@pytest.mark.parametrize("D", HOPPER_FORWARD)
def test_what_stands_in_padding_never_matters(hopper, D):
    q, k, v = tensors(hopper, D, B=2, N=1500)
    mask = padding(hopper, 2, 1500)
    for value in (float("nan"), float("inf")):
        garbage = (x.masked_fill(~mask[:, :, None, None], value) for x in (k, v))
        assert_both_kernels_are_right(q, *garbage, mask, 123)


@pytest.mark.gpu
@pytest.mark.parametrize("D", HOPPER_FORWARD)
def test_rows_without_a_visible_key(hopper, D):
    q, k, v = tensors(hopper, D)
    for first_real in (130, 999, 1000):
        mask = (torch.arange(1000, device=hopper) >= first_real)[None]
        assert_both_kernels_are_right(q, k, v, mask, 100)


@pytest.mark.gpu
@pytest.mark.parametrize("D", HOPPER_FORWARD)
def test_fp16_and_large_scores(hopper, D):
    assert_both_kernels_are_right(*tensors(hopper, D, dtype=FP16), padding(hopper, 1, 1000), 63)
    assert_both_kernels_are_right(*tensors(hopper, D, scale=8.0), padding(hopper, 1, 1000), 63)


@pytest.mark.gpu
@pytest.mark.parametrize("D", HOPPER_FORWARD)
def test_strided_and_expanded_inputs(hopper, D):
    q, k, v = torch.randn(2, 700, 2, 3 * D, generator=torch.Generator().manual_seed(1)).to(hopper, BF16).split(D, -1)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    one_for_all = [q, k[:, :, :1].expand(-1, -1, 2, -1), v[:1].expand(2, -1, -1, -1)]
    odd = [x[..., :1].expand(*x.shape) for x in (q, k, v)]
    unaligned = [torch.randn(2, 700, 2, D + 1, device=hopper).to(BF16)[..., 1:] for _ in range(3)]
    for inputs in ((q, k, v), heads_first, one_for_all, odd, unaligned):
        assert_both_kernels_are_right(*inputs, None, 123)


@pytest.mark.gpu
def test_it_serves_what_it_was_measured_for_and_nothing_else(hopper):
    forward = hopper_kernels()[0]
    heads = FEWEST_TILES // (FEWEST_ROWS // 192)
    for D, dtype, N, H, launch in (
        (32, BF16, FEWEST_ROWS, heads, forward),
        (64, FP16, FEWEST_ROWS, heads, forward),
        (64, BF16, FEWEST_ROWS - 1, heads, launch_forward),
        (64, BF16, FEWEST_ROWS, heads // 2, launch_forward),
        (40, BF16, FEWEST_ROWS, heads, launch_forward),
        (128, BF16, FEWEST_ROWS, heads, launch_forward),
        (64, torch.float32, FEWEST_ROWS, heads, launch_forward),
    ):
        q, k, v = tensors(hopper, D, N=N, Hq=H, Hkv=H, dtype=dtype)
        assert (hopper_forward(q) or launch_forward) == launch
        out, lse = op.forward(q, k, v, None, 63, D**-0.5)
        same = launch(q, k, v, None, 63, D**-0.5)
        assert torch.equal(out, same[0])
        assert torch.equal(lse, same[1])


@pytest.mark.gpu
@pytest.mark.parametrize("D", HOPPER_FORWARD)
def test_it_repeats_bit_for_bit_beside_other_work(hopper, D):
    """A barrier that is passed too early shows as a rare difference."""
    q, k, v = tensors(hopper, D, N=20000, Hq=8, Hkv=8)
    mask = padding(hopper, 1, 20000, share=0.001)
    first = flash_attention(q, k, v, causal_block=6712, key_mask=mask)
    other = torch.randn(4096, 4096, device=hopper, dtype=BF16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(10):
        with torch.cuda.stream(stream):
            other = (other @ other).clamp(-1, 1)
        assert torch.equal(first, flash_attention(q, k, v, causal_block=6712, key_mask=mask))


def assert_both_kernels_are_right(q, k, v, mask, causal_block):
    scale = q.shape[-1] ** -0.5
    clean = (q, k, v)
    if mask is not None:
        clean = (q, *(x.masked_fill(~mask[:, :, None, None], 0) for x in (k, v)))
    truth = attention_reference(*(x.double() for x in clean), causal_block=causal_block, key_mask=mask)
    plain = dense_in_the_same_dtype(*clean, causal_block=causal_block, key_mask=mask)
    allowed = 2 * (plain - truth).abs().max() + torch.finfo(q.dtype).eps * truth.abs().max() + 1e-5
    lse = log_sum_exp(*clean[:2], mask, causal_block, scale)
    for launch in (hopper_kernels()[0], launch_forward):
        out, ours = launch(q, k, v, mask, causal_block, scale)
        assert (out - truth).abs().max() <= allowed
        torch.testing.assert_close(ours, lse.float(), rtol=1e-5, atol=2e-3)


def log_sum_exp(q, k, mask, causal_block, scale):
    """[B, Hq, N] in units of log2, +inf for a row that sees nothing."""
    seen = visible_pairs(q.shape[1], k.shape[1], causal_block, mask, q.device)
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * scale / math.log(2)
    lse = torch.logsumexp(scores.masked_fill(~seen, -torch.inf) * math.log(2), -1) / math.log(2)
    return torch.where(lse == -torch.inf, torch.inf, lse)
