"""flash_attention against its dense reference: patterns, shapes, dtypes, masks, gradients, memory and composition."""

import itertools
import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from trunkline.kernels.attention import flash, flash_attention
from trunkline.kernels.reference import attention_reference, visible_pairs


def inputs(B=2, N=12, M=12, Hq=2, Hkv=2, D=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, N, Hq, D), (B, M, Hkv, D), (B, M, Hkv, D))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def some_keys(B, M, seed=1):
    """A mask with padding at both ends and in between, one row without any real key."""
    mask = torch.rand(B, M, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask[-1] = False
    return mask


def gradients(out, leaves, seed=2):
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad(out, leaves, upstream)


SHAPES = [(12, 12), (63, 63), (20, 33), (33, 20), (1, 40), (40, 1), (5, 123)]


@pytest.mark.parametrize("causal_block", [None, 1, 2, 7, 21, 1000])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_dense_reference_in_fp64(causal_block, masked):
    for (N, M), Hkv in itertools.product(SHAPES, (1, 2, 4)):
        leaves = inputs(N=N, M=M, Hq=4, Hkv=Hkv, D=24, dtype=torch.float64)
        mask = some_keys(2, M) if masked else None
        for scale in (None, 0.7):
            out = flash_attention(*leaves, causal_block=causal_block, key_mask=mask, softmax_scale=scale)
            want = attention_reference(*leaves, causal_block=causal_block, key_mask=mask, softmax_scale=scale)
            torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-12)
            for got, expected in zip(gradients(out, leaves), gradients(want, leaves), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("D", [16, 32, 64, 80, 128, 256])
def test_is_as_accurate_as_dense_torch_in_the_same_dtype(dtype, masked, D):
    leaves = inputs(N=126, M=126, Hq=8, Hkv=1, D=D, dtype=dtype)
    mask = some_keys(2, 126) if masked else None
    wide = [x.detach().float().requires_grad_() for x in leaves]
    want = attention_reference(*wide, causal_block=63, key_mask=mask)
    out = flash_attention(*leaves, causal_block=63, key_mask=mask)
    plain = dense_in_the_same_dtype(*leaves, causal_block=63, key_mask=mask)
    assert out.dtype == dtype
    triples = [(out, plain, want), *zip(*(gradients(o, x) for o, x in ((out, leaves), (plain, leaves), (want, wide))))]
    for ours, theirs, truth in triples:
        ours_error, theirs_error = ((x.detach().float() - truth).abs().max() for x in (ours, theirs))
        assert ours_error <= 2 * theirs_error + 1e-5


def dense_in_the_same_dtype(q, k, v, causal_block, key_mask):
    seen = visible_pairs(q.shape[1], k.shape[1], causal_block, key_mask)
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = (torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5).masked_fill(~seen, torch.finfo(q.dtype).min)
    weights = scores.softmax(-1).masked_fill(~seen, 0)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


@pytest.mark.parametrize("causal_block", [None, 1, 4])
def test_rows_without_a_visible_key_give_zero_and_pass_no_gradient(causal_block):
    leaves = inputs(B=2, N=12, M=12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :4] = False
    mask[1] = False
    out = flash_attention(*leaves, causal_block=causal_block, key_mask=mask)
    dead = torch.zeros(2, 12, dtype=torch.bool)
    dead[1] = True
    dead[0, :4] = causal_block is not None
    assert (out[dead] == 0).all()
    assert (out[~dead].abs().sum(dim=(-1, -2)) > 0).all()
    dq, dk, dv = torch.autograd.grad(out[dead].sum(), leaves)
    assert all((g == 0).all() for g in (dq, dk, dv))


@pytest.mark.parametrize("causal_block", [None, 1, 4])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_what_stands_in_padding_never_matters(causal_block, garbage):
    leaves = inputs(B=2, N=12, M=12)
    mask = some_keys(2, 12)
    spoiled = [x.detach().clone() for x in leaves]
    spoiled[1][~mask] = garbage
    spoiled[2][~mask] = garbage
    spoiled[0][1] = garbage  # the queries of the sample that has no key
    spoiled = [x.requires_grad_() for x in spoiled]
    clean_out = flash_attention(*leaves, causal_block=causal_block, key_mask=mask)
    spoiled_out = flash_attention(*spoiled, causal_block=causal_block, key_mask=mask)
    torch.testing.assert_close(spoiled_out, clean_out, rtol=0, atol=0)
    for got, want in zip(gradients(spoiled_out, spoiled), gradients(clean_out, leaves), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_gradcheck():
    leaves = inputs(B=1, N=3, M=5, Hq=2, Hkv=1, dtype=torch.float64)
    mask = torch.tensor([[False, False, True, False, True]])
    for causal_block, key_mask in itertools.product((None, 1, 2), (None, mask)):
        call = lambda q, k, v, c=causal_block, m=key_mask: flash_attention(q, k, v, causal_block=c, key_mask=m)  # noqa: E731
        assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("shape", [{"N": 0}, {"M": 0}, {"B": 0}, {"N": 0, "M": 0}])
def test_no_rows(shape):
    leaves = inputs(**shape)
    leaves[0].data.fill_(float("nan"))
    out = flash_attention(*leaves, causal_block=4)
    assert out.shape == leaves[0].shape
    assert (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), leaves))


def test_inputs_need_not_be_contiguous():
    packed = torch.randn(2, 12, 2, 3, 16, generator=torch.Generator().manual_seed(0))
    views = [packed[:, :, :, i] for i in range(3)]
    turned = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in views]
    want = flash_attention(*(x.contiguous() for x in views), causal_block=4)
    for leaves in (views, turned):
        assert not leaves[0].is_contiguous()
        torch.testing.assert_close(flash_attention(*leaves, causal_block=4), want, rtol=0, atol=0)


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() > 8:
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("causal_block", [None, 1, 500])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_no_tensor_of_size_n_by_m(causal_block, masked, turned):
    N = 2000
    leaves = inputs(B=1, N=N, M=N, Hq=2, Hkv=1)
    if turned:  # the head dimension is not the innermost one
        leaves = [x.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_() for x in leaves]
    with LargestTensor() as largest:
        out = flash_attention(*leaves, causal_block=causal_block, key_mask=some_keys(1, N) if masked else None)
        out.sum().backward()
    assert 0 < largest.numel < N * N / 20


@pytest.mark.parametrize("causal_block", [None, 1, 500])
@pytest.mark.parametrize("masked", [False, True])
def test_no_key_head_is_held_once_for_each_query_head(causal_block, masked):
    N, M = 2, 2000
    leaves = inputs(B=1, N=N, M=M, Hq=16, Hkv=1)
    with LargestTensor() as largest:
        out = flash_attention(*leaves, causal_block=causal_block, key_mask=some_keys(1, M) if masked else None)
        out.sum().backward()
    assert M * 16 <= largest.numel <= 2 * M * 16


def test_torch_s_own_kernels_serve_few_rows_little_work_and_wide_heads_within_their_grid(monkeypatch):
    for name, value in (("ROWS_PER_CHANNEL", 32), ("PRODUCTS", 2**34), ("WIDEST", 64)):
        monkeypatch.setattr(flash, name, value)

    def serves(B, N, H, D, causal_block=1, key_mask=None, dtype=torch.bfloat16):
        q = torch.empty(B, N, H, D, device="cuda", dtype=dtype)
        return flash._torch_serves(q, q, q.dtype, causal_block, key_mask)

    with FakeTensorMode():
        assert serves(64, 2048, 8, 64)  # 32 rows a channel
        assert serves(1, 4096, 16, 64)  # 2^34 products
        assert serves(64, 8192, 8, 128)
        assert not serves(1, 4096, 17, 64)
        assert not serves(64, 4096, 8, 64)
        assert serves(2**16 - 1, 1, 1, 64)
        assert serves(1, 1, 2**16 - 1, 64)
        assert not serves(2**16, 1, 1, 64)
        assert not serves(1, 1, 2**16, 64)
        assert not serves(1, 100, 1, 64, causal_block=50)
        assert serves(1, 100, 1, 64, causal_block=100)
        assert not serves(1, 100, 1, 64, key_mask=torch.empty(1, 100, dtype=torch.bool, device="cuda"))
        assert not serves(1, 100, 1, 64, dtype=torch.float32)


def test_the_detector_of_large_tensors_detects_the_dense_reference():
    leaves = inputs(B=1, N=500, M=500)
    with LargestTensor() as largest:
        attention_reference(*leaves)
    assert largest.numel >= 500 * 500


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_without_graph_breaks(masked):
    leaves = inputs(N=10, M=14)
    mask = some_keys(2, 14) if masked else None
    compiled = torch.compile(flash_attention, fullgraph=True, backend="aot_eager")
    want = flash_attention(*leaves, causal_block=4, key_mask=mask)
    out = compiled(*leaves, causal_block=4, key_mask=mask)
    torch.testing.assert_close(out, want)
    for got, expected in zip(gradients(out, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(got, expected)


def test_activation_checkpointing_changes_nothing():
    leaves = inputs()
    call = lambda q, k, v: flash_attention(q, k, v, causal_block=4)  # noqa: E731
    want = gradients(call(*leaves), leaves)
    got = gradients(checkpoint(call, *leaves, use_reentrant=False), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


BAD = [
    ("q must be a tensor .*; got shape", lambda q, k, v: flash_attention(q[0], k, v)),
    ("q must be a tensor .*; got shape", lambda q, k, v: flash_attention(q[0, 0, 0, 0], k, v)),
    ("v must be a tensor; got a NoneType", lambda q, k, v: flash_attention(q, k, None)),
    ("k has dtype", lambda q, k, v: flash_attention(q, k.half(), v)),
    ("v has dtype", lambda q, k, v: flash_attention(q, k, v.double())),
    ("one of bf16", lambda q, k, v: flash_attention(q.int(), k.int(), v.int())),
    ("k is on meta, q on cpu", lambda q, k, v: flash_attention(q, k.to("meta"), v)),
    ("v is on meta, q on cpu", lambda q, k, v: flash_attention(q, k, v.to("meta"))),
    ("k and v must have one shape", lambda q, k, v: flash_attention(q, k, v[:, 1:])),
    ("k must be", lambda q, k, v: flash_attention(q, k[..., :8], v[..., :8])),
    ("between 16 and 256; q has 8", lambda q, k, v: flash_attention(q[..., :8], k[..., :8], v[..., :8])),
    ("between 16 and 256; q has 0", lambda q, k, v: flash_attention(q[..., :0], k[..., :0], v[..., :0])),
    (
        "between 16 and 256; q has 257",
        lambda q, k, v: flash_attention(*(x[..., :1].repeat(1, 1, 1, 257) for x in (q, k, v))),
    ),
    ("multiple", lambda q, k, v: flash_attention(q[:, :, :1], k, v)),
    *(
        ("causal_block must be .* got", lambda q, k, v, c=c: flash_attention(q, k, v, causal_block=c))
        for c in (0, -1, True, 4.0, "4", 2**63, torch.tensor(4), torch.tensor([4, 4]))
    ),
    *(
        ("softmax_scale must be", lambda q, k, v, s=s: flash_attention(q, k, v, softmax_scale=s))
        for s in (math.nan, math.inf, 0.0, -1.0, True, "1", 10**400, 1e39, torch.tensor(0.25), torch.ones(2))
    ),
    ("key_mask must be a tensor; got a list", lambda q, k, v: flash_attention(q, k, v, key_mask=[True] * 12)),
    ("key_mask must be bool", lambda q, k, v: flash_attention(q, k, v, key_mask=torch.ones(2, 12))),
    (r"key_mask must be bool \[2, 12\]", lambda q, k, v: flash_attention(q, k, v, key_mask=torch.ones(2, 5).bool())),
    ("key_mask is on meta", lambda q, k, v: flash_attention(q, k, v, key_mask=torch.ones(2, 12).bool().to("meta"))),
]


@pytest.mark.parametrize(("message", "call"), BAD)
def test_arguments_that_do_not_fit_are_named(message, call):
    with pytest.raises(ValueError, match=message):
        call(*inputs())
