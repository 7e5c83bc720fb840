"""relative_attention in plain PyTorch against a dense fp64 reference: values, gradients, and what backward keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from trunkline.kernels.attention import relative
from trunkline.kernels.attention.relative import relative_attention
from trunkline.kernels.reference import relative_attention_reference

SMALL_TILES = 4096  # bytes: 16 queries of one row


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many tiles":
        monkeypatch.setattr(relative, "_CPU_TILE_BYTES", SMALL_TILES)


def inputs(
    B: int, N: int, M: int, H: int = 2, D: int = 8, dtype: torch.dtype = torch.float64, bias: bool = True
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(N + 1000 * M)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    return {
        "query": draw(B, N, H, D), "key": draw(B, M, H, D), "value": draw(B, M, H, D),
        "bias": draw(H, N + M - 1) if bias else None,
    }  # fmt: skip


def documents(B: int, N: int, pattern: str) -> Tensor:
    generator = torch.Generator().manual_seed(N)
    if pattern == "one":
        return torch.zeros(B, N, dtype=torch.int64)
    if pattern == "padded":
        return torch.where(torch.arange(N) < torch.randint(0, N + 1, (B, 1), generator=generator), 0, -1)
    drawn = torch.randint(-1, 5, (B, N), generator=generator)
    if pattern == "any":
        return drawn
    assert pattern == "packed"  # ascending, some documents without tokens on one side, padding at the end
    number = drawn.where(drawn >= 0, 99).sort(1).values
    return number.where(number < 99, -1)


def value_and_gradients(function: Any, given: dict[str, Any], upstream: Tensor, **options: Any) -> list[Tensor]:
    out = function(**given, **options)
    wanted = [x for x in given.values() if x is not None]
    return [out, *torch.autograd.grad(out, wanted, upstream.to(out.dtype))]


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("pattern", ["one", "padded", "packed", "any"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("N", "M", "bias"), [(40, 37, True), (37, 70, False), (1, 5, True), (5, 1, True)])
def test_values_and_gradients_are_those_of_a_dense_reference(
    N: int, M: int, bias: bool, causal: bool, pattern: str
) -> None:
    given = inputs(3, N, M, bias=bias)
    options: dict[str, Any] = {
        "query_document": documents(3, N, pattern), "key_document": documents(3, M, pattern), "causal": causal,
        "softmax_scale": 0.7,
    }  # fmt: skip
    upstream = torch.randn(3, N, 2, 8, dtype=torch.float64)
    ours = value_and_gradients(relative_attention, given, upstream, **options)
    theirs = value_and_gradients(relative_attention_reference, given, upstream, **options)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("tiles")
def test_gradients_are_those_of_finite_differences() -> None:
    given = inputs(2, 9, 7, D=3)
    options = {"query_document": documents(2, 9, "packed"), "key_document": documents(2, 7, "packed")}
    names = list(given)
    assert torch.autograd.gradcheck(
        lambda *tensors: relative_attention(**dict(zip(names, tensors, strict=True)), **options), tuple(given.values())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_at_most_twice_those_of_plain_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relative, "_CPU_TILE_BYTES", SMALL_TILES)
    given = inputs(2, 50, 60, dtype=dtype)
    documents_of = {"query_document": documents(2, 50, "packed"), "key_document": documents(2, 60, "packed")}
    seen = documents_of["query_document"][:, None, :, None] == documents_of["key_document"][:, None, None]

    def plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        i, j = torch.arange(50)[:, None], torch.arange(60)
        scores = torch.einsum("bihd,bjhd->bhij", query, key) + bias[:, j - i + 49]
        p = scores.masked_fill(~seen, torch.finfo(dtype).min).softmax(-1)
        real = (documents_of["query_document"] >= 0) & seen.any(-1).squeeze(1)
        return torch.einsum("bhij,bjhd->bihd", p, value) * real[..., None, None]

    upstream = torch.randn(2, 50, 2, 8)
    wide = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    exact = value_and_gradients(relative_attention_reference, wide, upstream.to(dtype), **documents_of)
    ours = value_and_gradients(relative_attention, given, upstream, **documents_of)
    theirs = value_and_gradients(plain, given, upstream)
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == dtype
        assert (mine - true).norm() <= 2 * (other - true).norm() + 1e-7 * true.norm()


@pytest.mark.usefixtures("tiles")
def test_padding_gives_0_and_no_gradient_whatever_it_holds() -> None:
    given = inputs(2, 40, 30, dtype=torch.float32)
    query_document, key_document = documents(2, 40, "one"), documents(2, 30, "one")
    query_document[:, 25:], key_document[:, 20:] = -1, -1
    query_document[1], key_document[0, 3] = -1, 7  # a row of padding; a document that no query is of
    with torch.no_grad():
        for name, document in (("query", query_document), ("key", key_document), ("value", key_document)):
            given[name][document < 0] = 1e4
    out, *gradients = value_and_gradients(
        relative_attention, given, torch.ones(2, 40, 2, 8), query_document=query_document, key_document=key_document
    )
    assert out[query_document < 0].eq(0).all()
    assert out[0, :25].abs().max() < 100
    for gradient, document in zip(gradients, (query_document, key_document, key_document), strict=False):
        assert gradient[document < 0].eq(0).all()
    assert gradients[2][0, 3].eq(0).all()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.usefixtures("tiles")
def test_what_is_dropped_follows_from_the_global_generator_and_is_the_same_in_both_passes() -> None:
    B, N, M, share = 2, 40, 60, 0.3
    given = inputs(B, N, M, D=M, dtype=torch.float32)
    with torch.no_grad():
        given["value"].copy_(torch.eye(M)[None, :, None].expand(B, M, 2, M))  # then the result is the probabilities
    options = {"query_document": documents(B, N, "one"), "key_document": documents(B, M, "one")}
    whole = relative_attention(**given, **options)
    torch.manual_seed(3)
    out = relative_attention(**given, **options, dropout=share)
    after = torch.get_rng_state()
    kept = out.ne(0)
    count = kept.numel()
    assert abs(kept.sum().item() / count - (1 - share)) < 4 * (share * (1 - share) / count) ** 0.5
    torch.testing.assert_close(out, (whole / (1 - share)).where(kept, 0))
    assert kept[0].ne(kept[1]).any()
    assert kept[:, :, 0].ne(kept[:, :, 1]).any()
    assert kept[:, 16].ne(kept[:, 32]).any()

    torch.manual_seed(3)
    again = relative_attention(**given, **options, dropout=share)
    assert torch.equal(out, again)
    assert torch.equal(after, torch.get_rng_state())
    assert not torch.equal(out, relative_attention(**given, **options, dropout=share))

    noise = kept.permute(0, 2, 1, 3).double() / (1 - share)
    wide = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    i, j = torch.arange(N)[:, None], torch.arange(M)
    scores = torch.einsum("bihd,bjhd->bhij", wide["query"], wide["key"]) + wide["bias"][:, j - i + N - 1]
    dense = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1) * noise, wide["value"])
    upstream = torch.randn(out.shape)
    expected = torch.autograd.grad(dense, list(wide.values()), upstream.double())
    torch.manual_seed(5)  # the backward pass draws nothing
    for mine, true in zip(torch.autograd.grad(out, list(given.values()), upstream), expected, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-5)


def test_nothing_of_the_size_of_the_scores_is_kept_for_the_backward_pass() -> None:
    given = inputs(2, 300, 400, D=4, dtype=torch.float32)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        relative_attention(
            **given, query_document=documents(2, 300, "one"), key_document=documents(2, 400, "one"), dropout=0.1
        )
    assert kept
    assert sum(kept) <= 1 + 2 * (300 + 400 + 400) * 2 * 4 + 2 * 699 + 2 * 700


def test_only_keys_that_a_tile_may_see_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relative, "_CPU_TILE_BYTES", 2**18)
    query_document = torch.arange(512)[None].expand(4, -1) // 64  # 8 documents of 64 queries and 128 keys each
    key_document = torch.arange(1024)[None].expand(4, -1) // 128
    query_document, key_document = query_document.clone(), key_document.clone()
    query_document[:, 448:] = -1

    def pairs(causal: bool = False) -> int:
        found = relative._tiles(query_document, key_document, 4, causal)
        return sum((r.stop - r.start) * (q.stop - q.start) * (k.stop - k.start) for r, q, k in found)

    assert pairs() == 4 * 7 * 64 * 128
    query_document[:], key_document = torch.zeros(4, 512), torch.zeros(4, 512, dtype=torch.int64)
    assert pairs() == 4 * 512 * 512
    assert 4 * 512 * 513 // 2 <= pairs(causal=True) <= 4 * 512 * (512 + 64) // 2


def test_the_gradient_of_the_bias_is_the_same_in_every_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relative, "_CPU_TILE_BYTES", SMALL_TILES)
    given, document = inputs(3, 60, 60, dtype=torch.float32), documents(3, 60, "packed")
    runs = [
        value_and_gradients(
            relative_attention, given, torch.ones(3, 60, 2, 8), query_document=document, key_document=document
        )
        for _ in range(3)
    ]
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(runs[0], run, strict=True))


def test_autocast_decides_the_dtype_of_the_products() -> None:
    given, document = inputs(1, 12, 12, dtype=torch.float32), documents(1, 12, "one")
    options = {"query_document": document, "key_document": document}
    with torch.autocast("cpu", torch.bfloat16):
        out = relative_attention(**given, **options)
    rounded = {name: x.detach().bfloat16() for name, x in given.items()} | {"bias": given["bias"]}
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, relative_attention(**rounded, **options))
    assert torch.autograd.grad(out.float().sum(), given["query"])[0].dtype == torch.float32


def test_second_derivatives_and_forward_mode_are_refused() -> None:
    given, document = inputs(1, 6, 6), documents(1, 6, "one")
    options = {"query_document": document, "key_document": document}
    out = relative_attention(**given, **options)
    (first,) = torch.autograd.grad(out.pow(2).sum(), given["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="relative_attention is differentiable once"):
        first.sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(given["key"].detach(), torch.ones(1, 6, 2, 8, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="relative_attention has no forward-mode"):
            relative_attention(**(given | {"key": dual}), **options)


def test_arguments_that_do_not_fit_are_value_errors() -> None:
    given, document = inputs(2, 6, 5, dtype=torch.float32), documents(2, 6, "one")
    good = given | {"query_document": document, "key_document": documents(2, 5, "one")}
    bad: list[tuple[dict[str, Any], str]] = [
        ({"query": 3}, "query must be a tensor; got a int"),
        ({"query": torch.zeros(2, 6, 2)}, r"query must be \[B, N, H, D\], not empty"),
        ({"query": torch.zeros(2, 0, 2, 8)}, "not empty"),
        ({"key": torch.zeros(2, 5, 3, 8)}, r"key must be \[2, 5, 2, 8\]"),
        ({"key": torch.zeros(2, 0, 2, 8), "value": torch.zeros(2, 0, 2, 8)}, "key must be"),
        ({"value": torch.zeros(2, 4, 2, 8)}, r"value must be \[2, 5, 2, 8\]"),
        ({"bias": torch.zeros(2, 11)}, r"bias must be \[2, 10\]"),
        ({"bias": torch.zeros(2, 10, dtype=torch.int64)}, "bias has dtype torch.int64"),
        ({"query_document": document[:1]}, r"query_document must be \[2, 6\]"),
        ({"query_document": document.int()}, "query_document must be int64; got torch.int32"),
        ({"key": given["key"].double()}, "key has dtype torch.float64"),
        ({"value": given["value"].to("meta")}, "value is on meta, query on cpu"),
        ({"dropout": 1.0}, "dropout must be a number from 0 to below 1; got 1.0"),
        ({"softmax_scale": 0.0}, "softmax_scale must be a number"),
    ]
    for change, message in bad:
        with pytest.raises(ValueError, match=message):
            relative_attention(**(good | change))


@pytest.mark.usefixtures("tiles")
def test_tensors_without_values_have_the_shapes_of_those_with_some() -> None:
    with FakeTensorMode():
        given = {
            name: None if x is None else torch.empty(x.shape, requires_grad=True)
            for name, x in inputs(2, 40, 50).items()
        }
        options = {"query_document": torch.zeros(2, 40).long(), "key_document": torch.zeros(2, 50).long()}
        out, *gradients = value_and_gradients(
            relative_attention, given, torch.empty(2, 40, 2, 8), **options, dropout=0.1
        )
    assert out.shape == (2, 40, 2, 8)
    assert [x.shape for x in gradients] == [(2, 40, 2, 8), (2, 50, 2, 8), (2, 50, 2, 8), (2, 89)]


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("pattern", ["padded", "packed"])
def test_on_a_gpu_too(pattern: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With heads that the kernels do not take."""
    monkeypatch.setattr(relative, "_GPU_TILE_BYTES", SMALL_TILES)
    given = inputs(3, 40, 37, D=12)
    where = {"query_document": documents(3, 40, pattern), "key_document": documents(3, 37, pattern)}
    upstream = torch.randn(3, 40, 2, 12, generator=torch.Generator().manual_seed(1))
    theirs = value_and_gradients(relative_attention_reference, given, upstream, **where)
    on_gpu = {name: x.detach().cuda().to(dtype).requires_grad_() for name, x in given.items()}
    there = {name: x.cuda() for name, x in where.items()}
    ours = value_and_gradients(relative_attention, on_gpu, upstream.cuda(), **there)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.cpu().to(other.dtype), other, rtol=0, atol=tolerance)
