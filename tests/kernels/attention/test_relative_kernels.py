"""The Triton kernels of relative_attention: on the CPU interpreted, in small tiles, and with `-m gpu` as shipped."""

from __future__ import annotations

import itertools
import mmap
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.kernels.attention.test_relative import documents, inputs, value_and_gradients
from trunkline.kernels.attention import relative_op
from trunkline.kernels.attention.relative import relative_attention
from trunkline.kernels.attention.relative_op import RelativeAttention, takes
from trunkline.kernels.attention.tiles import Tile
from trunkline.kernels.reference import relative_attention_reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BITS = 2**32 - 1
pytestmark = pytest.mark.usefixtures("bf16_rounds_to_nearest")


@pytest.fixture(autouse=True)
def small_tiles(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, so that short sequences have inner tiles and boundaries; of more keys, and of fewer."""
    if device.type == "cpu":
        tiles = Tile(16, 16, 4, 2), Tile(16, 32, 4, 2), Tile(32, 16, 4, 2)
        monkeypatch.setattr(relative_op, "choose_tiles", lambda *_: tiles)


def given(device: torch.device, *sizes: int, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    drawn = inputs(*sizes, dtype=dtype, **options)
    return {name: x if x is None else x.detach().to(device).requires_grad_() for name, x in drawn.items()}


def where(device: torch.device, B: int, N: int, M: int, pattern: str) -> dict[str, Any]:
    return {name: documents(B, n, pattern).to(device) for name, n in (("query_document", N), ("key_document", M))}


def upstream_of(query: Tensor) -> Tensor:
    return torch.randn(query.shape, generator=torch.Generator().manual_seed(1)).to(query.device, query.dtype)


def dense(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, query_document: Tensor, key_document: Tensor,
    causal: bool = False, softmax_scale: float = 1.0, kept: Tensor | None = None, dropout: float = 0.0,
) -> Tensor:  # fmt: skip
    """In plain torch, in the dtype of its inputs; `kept` [B, H, N, M] says which probabilities are not dropped."""
    N, M = query.shape[1], key.shape[1]
    i, j = torch.arange(N, device=query.device)[:, None], torch.arange(M, device=query.device)
    scores = torch.einsum("bihd,bjhd->bhij", query, key) * softmax_scale
    scores = scores if bias is None else scores + bias[:, j - i + N - 1]
    seen = (query_document[:, :, None] == key_document[:, None]) & (query_document >= 0)[:, :, None]
    seen = (seen & (j <= i) if causal else seen)[:, None]
    p = scores.masked_fill(~seen, torch.finfo(query.dtype).min).softmax(-1) * seen
    return torch.einsum("bhij,bjhd->bihd", p if kept is None else p * kept / (1 - dropout), value)


def assert_as_accurate_as_dense_torch(leaves: dict[str, Any], kept: Tensor | None = None, **options: Any) -> None:
    """The error of the output and of every gradient is at most twice that of dense torch in the same dtype."""
    upstream = upstream_of(leaves["query"])
    wide = {name: x if x is None else x.detach().double().requires_grad_() for name, x in leaves.items()}
    truth = value_and_gradients(dense, wide, upstream, kept=kept, **options)
    plain = value_and_gradients(dense, leaves, upstream, kept=kept, **options)
    ours = value_and_gradients(relative_attention, leaves, upstream, **options)
    for mine, other, true in zip(ours, plain, truth, strict=True):
        assert mine.dtype == other.dtype
        assert (mine - true).norm() <= 2 * (other - true).norm() + 1e-6 * true.norm()


@pytest.mark.parametrize("pattern", ["one", "padded", "packed", "any"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("N", "M", "bias"), [(37, 21, True), (20, 45, True), (21, 37, False), (1, 5, True), (5, 1, True)]
)
def test_values_and_gradients_are_those_of_a_dense_reference(
    device: torch.device, N: int, M: int, bias: bool, causal: bool, pattern: str
) -> None:
    leaves = given(device, 2, N, M, bias=bias)
    options = where(device, 2, N, M, pattern) | {"causal": causal, "softmax_scale": 0.7}
    wide = {name: x if x is None else x.detach().double().requires_grad_() for name, x in leaves.items()}
    upstream = upstream_of(leaves["query"])
    ours = value_and_gradients(relative_attention, leaves, upstream, **options)
    theirs = value_and_gradients(relative_attention_reference, wide, upstream, **options)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [8, 24, 64, 128])
def test_every_head_dimension(device: torch.device, D: int, dtype: torch.dtype) -> None:
    leaves = given(device, 1, 20, 35, D=D, dtype=dtype)
    assert_as_accurate_as_dense_torch(leaves, **where(device, 1, 20, 35, "packed"), softmax_scale=D**-0.5)


def test_a_bias_of_another_dtype_and_one_that_needs_no_gradient(device: torch.device) -> None:
    leaves, options = given(device, 1, 20, 20, dtype=torch.float16), where(device, 1, 20, 20, "packed")
    upstream = upstream_of(leaves["query"])
    out, *gradients = value_and_gradients(relative_attention, leaves, upstream, **options)
    wide = leaves | {"bias": leaves["bias"].detach().double()}
    again = relative_attention(**wide, **options)
    assert torch.equal(out, again)
    fixed = torch.autograd.grad(again, [leaves[name] for name in ("query", "key", "value")], upstream)
    assert all(torch.equal(x, y) for x, y in zip(gradients, fixed, strict=False))


def test_views_of_one_layer_s_output_are_read_where_they_lie(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    joined = torch.randn(2, 20, 3, 2, 8, generator=torch.Generator().manual_seed(3)).to(device).requires_grad_()
    bias, options = given(device, 2, 20, 20)["bias"], where(device, 2, 20, 20, "any")
    addressable, copied = relative_op.addressable, []

    def noted(x: Tensor) -> Tensor:
        passed = addressable(x)
        copied.append(passed.data_ptr() != x.data_ptr())
        return passed

    monkeypatch.setattr(relative_op, "addressable", noted)
    outs = [
        relative_attention(*(x.contiguous() if copy else x for x in joined.unbind(2)), bias=bias, **options)
        for copy in (False, True)
    ]
    upstream = torch.randn(2, 2, 20, 8, device=device).transpose(1, 2)
    (one,), (other,) = (torch.autograd.grad(out, joined, upstream) for out in outs)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(one, other)
    assert copied
    assert not any(copied)


def test_padding_gives_0_and_no_gradient_whatever_it_holds(device: torch.device) -> None:
    leaves, options = given(device, 2, 40, 30), where(device, 2, 40, 30, "one")
    query_document, key_document = options.values()
    query_document[:, 25:], key_document[:, 20:] = -1, -1
    query_document[1], key_document[0, 3] = -1, 7  # a row of padding; a document that no query is of
    query_document[0, 5] = 9  # one that no key is of
    sees_none = query_document != 0
    with torch.no_grad():
        for name, document in (("query", query_document), ("key", key_document), ("value", key_document)):
            leaves[name][document < 0] = 1e4
    out, *gradients = value_and_gradients(relative_attention, leaves, torch.ones(2, 40, 2, 8, device=device), **options)
    assert out[sees_none].eq(0).all()
    assert out[0, :5].ne(0).all()
    assert out.abs().max() < 100
    for gradient, unseen in zip(gradients, (sees_none, key_document != 0, key_document != 0), strict=False):
        assert gradient[unseen].eq(0).all()
    assert gradients[2][1].eq(0).all()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_only_what_a_tile_may_see_is_read(device: torch.device) -> None:
    """Documents of 64 tokens; one of them holds NaN, which would show."""
    leaves, document = given(device, 1, 192, 192, H=1), torch.arange(192, device=device)[None] // 64
    with torch.no_grad():
        for name in ("query", "key", "value"):
            leaves[name][:, 64:128] = torch.nan
    upstream = torch.ones(1, 192, 1, 8, device=device)
    for causal in (False, True):
        out, dq, dk, dv, _ = value_and_gradients(
            relative_attention, leaves, upstream, query_document=document, key_document=document, causal=causal
        )
        for x in (out, dq, dk, dv):
            assert x[:, document[0] != 1].isfinite().all()


def test_no_key_behind_a_causal_tile_is_read(device: torch.device) -> None:
    """Of one document: NaN in late keys, which no query of the first tiles sees, and in early queries."""
    leaves = given(device, 1, 192, 192, H=1)
    with torch.no_grad():
        for name in ("key", "value"):
            leaves[name][:, 128:] = torch.nan
    options = where(device, 1, 192, 192, "one") | {"causal": True}
    upstream = torch.ones(1, 192, 1, 8, device=device)
    out, dq, *_ = value_and_gradients(relative_attention, leaves, upstream, **options)
    assert out[:, :128].isfinite().all()
    assert dq[:, :128].isfinite().all()
    leaves = given(device, 1, 192, 192, H=1)
    with torch.no_grad():
        leaves["query"][:, :64] = torch.nan
    _, _, dk, dv, _ = value_and_gradients(relative_attention, leaves, upstream, **options)
    assert dk[:, 64:].isfinite().all()
    assert dv[:, 64:].isfinite().all()


def test_documents_are_found_however_far_away(device: torch.device) -> None:
    """A program looks through 1,024 tokens at once."""
    leaves, options = given(device, 1, 20, 1100, H=1), where(device, 1, 20, 1100, "one")
    options["query_document"] += 3
    options["key_document"][:, 1030:1050] = 3
    assert_as_accurate_as_dense_torch(leaves, **options)
    swapped = leaves | {"query": leaves["key"], "key": leaves["query"], "value": leaves["query"]}
    bias = {"bias": leaves["bias"].detach().flip(1).requires_grad_()}
    documents_of = dict(zip(options, reversed(options.values()), strict=True))
    assert_as_accurate_as_dense_torch(swapped | bias, **documents_of)


def kept(seed: int, B: int, H: int, N: int, M: int, dropout: float) -> Tensor:
    """[B, H, N, M], what the kernels should keep, in 64-bit integers."""

    def mix(x: Tensor) -> Tensor:
        x = (x ^ (x >> 16)) * 0x7FEB352D & BITS
        x = (x ^ (x >> 15)) * 0x846CA68B & BITS
        return x ^ (x >> 16)

    head = mix(mix(mix(torch.tensor(seed & 2**31 - 1)) ^ seed >> 31) ^ torch.arange(B * H))[:, None, None]
    row = mix(head + torch.arange(N)[:, None] & BITS)
    x = row ^ (mix(head ^ 0x9E3779B9) + torch.arange(M) * 0x9E3779B9 & BITS)
    x = x * 0x7FEB352D & BITS
    x = (x ^ (x >> 15)) * 0x846CA68B & BITS
    return ((x ^ 2**31) >= int(dropout * 2**32)).view(B, H, N, M)  # of a signed number's order


@pytest.mark.parametrize(("dtype", "causal"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)])
def test_what_is_dropped_follows_from_the_global_generator_by_this_formula(
    device: torch.device, dtype: torch.dtype, causal: bool
) -> None:
    """In both passes, and whatever the tiles are, of which each kernel has its own."""
    leaves, options = given(device, 2, 35, 40, dtype=dtype), where(device, 2, 35, 40, "packed")
    torch.manual_seed(3)
    seed = int(torch.randint(2**62, ()))
    torch.manual_seed(3)
    assert_as_accurate_as_dense_torch(
        leaves, kept(seed, 2, 2, 35, 40, 0.3).to(device), dropout=0.3, causal=causal, **options
    )
    assert not torch.equal(*(relative_attention(**leaves, **options, dropout=0.3) for _ in range(2)))


@pytest.mark.parametrize("dropout", [0.02, 0.1, 0.5])
def test_the_share_is_kept_and_neighbours_are_independent(dropout: float) -> None:
    B, H, N, M = 4, 2, 256, 256
    seeds = 3, 4, 3 + 2**31
    left = torch.stack([kept(seed, B, H, N, M, dropout) for seed in seeds]).flatten(1, 2).double()
    x = (left - (1 - dropout)) / (dropout * (1 - dropout)) ** 0.5  # [seed, head of a row, i, j], mean 0 and variance 1

    def assert_zero_on_average(products: Tensor) -> None:
        assert abs(products.mean()) * products.numel() ** 0.5 < 5

    assert_zero_on_average(x)
    for one, other in itertools.combinations(x, 2):
        assert_zero_on_average(one * other)
    for one, other in itertools.combinations(x.unbind(1), 2):
        assert_zero_on_average(one * other)
    for step in (1, 2, 3, 4, 7, 8, 16, 64, 128):
        below, right = x[:, :, step:] * x[:, :, :-step], x[..., step:] * x[..., :-step]
        for products in (below, right, below[..., step:] * below[..., :-step]):  # the last of the corners of a square
            assert_zero_on_average(products)
        assert_zero_on_average(x[:, :, step:, step:] * x[:, :, :-step, :-step])
        assert_zero_on_average(x[:, :, step:, :-step] * x[:, :, :-step, step:])
    for pairs in (x.mT @ x, x @ x.mT):  # of any two columns, of any two rows
        pairs = pairs[..., ~torch.eye(256, dtype=torch.bool)] / 256**0.5
        assert abs(pairs.square().mean() - 1) < 0.05


def test_the_same_bits_in_every_run(device: torch.device) -> None:
    leaves, options = given(device, 3, 40, 40), where(device, 3, 40, 40, "packed")
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        upstream = torch.ones(3, 40, 2, 8, device=device)
        runs.append(value_and_gradients(relative_attention, leaves, upstream, **options, dropout=0.1))
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_nothing_of_the_size_of_the_scores_is_kept_for_the_backward_pass(device: torch.device) -> None:
    leaves, kept_sizes = given(device, 1, 60, 80, H=1), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept_sizes.append(x.numel()) or x, lambda x: x):
        relative_attention(**leaves, **where(device, 1, 60, 80, "one"), dropout=0.1)
    assert kept_sizes
    assert sum(kept_sizes) <= 1 + (2 * 60 + 2 * 80) * 8 + 139 + 60 + 80 + 60


def test_autocast_decides_the_dtype_of_the_products(device: torch.device) -> None:
    leaves, options = given(device, 1, 12, 12), where(device, 1, 12, 12, "one")
    with torch.autocast(device.type, torch.bfloat16):
        out = relative_attention(**leaves, **options)
    rounded = {name: x.detach().bfloat16() for name, x in leaves.items()} | {"bias": leaves["bias"]}
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, relative_attention(**rounded, **options))
    assert torch.autograd.grad(out.float().sum(), leaves["query"])[0].dtype == torch.float32


def test_second_derivatives_are_refused(device: torch.device) -> None:
    leaves, options = given(device, 1, 6, 6), where(device, 1, 6, 6, "one")
    out = relative_attention(**leaves, **options)
    (first,) = torch.autograd.grad(out.pow(2).sum(), leaves["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="relative_attention is differentiable once"):
        first.sum().backward()


def test_are_proper_operators_of_torch(device: torch.device) -> None:
    leaves, options = given(device, 1, 10, 14), where(device, 1, 10, 14, "packed")
    inputs_ = [x.detach() for x in leaves.values()] + list(options.values())
    how = True, 0.25, 0.1, 5
    torch.library.opcheck(relative_op.forward.operator, (*inputs_, *how))
    out, lse = relative_op.forward(*inputs_, *how)
    for bias_learns in (False, True):
        torch.library.opcheck(relative_op.backward.operator, (out, *inputs_, out, lse, *how, bias_learns))


def test_tensors_without_values_have_the_shapes_of_those_with_some(device: torch.device) -> None:
    with FakeTensorMode():
        leaves = {
            name: torch.empty(x.shape, requires_grad=True, device=device) for name, x in inputs(2, 40, 50).items()
        }
        options = {"query_document": torch.zeros(2, 40), "key_document": torch.zeros(2, 50)}
        options = {name: x.long().to(device) for name, x in options.items()}
        upstream = torch.empty(2, 40, 2, 8, device=device)
        out, *gradients = value_and_gradients(relative_attention, leaves, upstream, **options, dropout=0.1)
    assert [x.shape for x in (out, *gradients)] == [(2, 40, 2, 8), *(x.shape for x in leaves.values())]


def test_fp64_and_heads_of_no_multiple_of_8_or_of_more_than_128_are_plain_torch_s(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert takes(torch.empty(1, 1, 1, 128, device=device), torch.bfloat16)
    monkeypatch.setattr(RelativeAttention, "apply", None)
    for D, dtype in ((8, torch.float64), (12, torch.float32), (136, torch.float32)):
        leaves, options = given(device, 1, 5, 5, D=D, dtype=dtype), where(device, 1, 5, 5, "one")
        assert relative_attention(**leaves, **options).dtype == dtype


@pytest.mark.parametrize(("capability", "served"), [((7, 5), False), ((8, 0), True)])
def test_gpus_before_compute_capability_8_have_plain_torch(
    capability: tuple[int, int], served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with FakeTensorMode():
        assert takes(torch.empty(1, 1, 1, 64, device="cuda"), torch.float16) == served


@pytest.mark.usefixtures("overflows_are_found")
def test_offsets_beyond_two_to_the_31_elements(device: torch.device) -> None:
    if device.type == "cuda":
        memory = torch.zeros(2**31 + 2**20, dtype=torch.float16, device=device)
    else:  # pages that nobody touches cost nothing
        memory = torch.frombuffer(mmap.mmap(-1, 2**32 + 2**21), dtype=torch.float16)
    near = given(device, 3, 20, 20, H=3, dtype=torch.float16)
    options, upstream = where(device, 3, 20, 20, "packed"), upstream_of(near["query"])
    want = value_and_gradients(relative_attention, near, upstream, **options)
    for name in ("query", "key", "value", "upstream"):
        for strides in ((2**30, 32, 8, 1), (1024, 32, 2**30, 1)):  # of 31 bits, but not their double
            x = upstream if name == "upstream" else near[name].detach()
            far = torch.as_strided(memory, x.shape, strides).copy_(x)
            leaves = near if name == "upstream" else near | {name: far.requires_grad_()}
            got = value_and_gradients(
                relative_attention, leaves, far.detach() if leaves is near else upstream, **options
            )
            assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("N", "M", "causal", "bias"), [(256, 256, False, True), (768, 768, True, True), (768, 256, False, False)]
)
def test_packed_rows_of_a_t5_s_size(N: int, M: int, causal: bool, bias: bool, dropout: float) -> None:
    """Encoder, decoder and cross attention of the preset `base`, 24 rows of 12 heads of 64, in bf16."""
    device, (B, H) = torch.device("cuda"), (24, 12)
    leaves = given(device, B, N, M, H, 64, dtype=torch.bfloat16, bias=bias)
    with torch.no_grad():
        leaves["query"] *= 64**-0.5
    options = where(device, B, N, M, "packed")
    torch.manual_seed(3)
    seed = int(torch.randint(2**62, ()))
    torch.manual_seed(3)
    left = kept(seed, B, H, N, M, dropout).to(device) if dropout else None
    assert_as_accurate_as_dense_torch(leaves, left, dropout=dropout, causal=causal, **options)
