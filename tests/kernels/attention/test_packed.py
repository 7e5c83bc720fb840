"""packed_attention against dense attention with the mask written out, and what its tables promise."""

import pytest
import torch

from trunkline.kernels.attention.packed import packed_attention, packing_tables
from trunkline.kernels.reference import packed_attention_reference

ROWS = {
    "ragged": [[5, 1, 20, 1, 9], [36], [17, 16, 3]],  # rows of 40; some end in padding, one is all padding
    "full rows": [[40], [16, 24], [1] * 40],
    "one row": [[33, 7]],
    "rows of only padding": [[], [3], []],
    "nothing but padding": [[], []],
}


def documents(rows, L=40):
    """[B, L] from the lengths of each row's documents."""
    numbers = [[i for i, length in enumerate(row) for _ in range(length)] for row in rows]
    return torch.tensor([row + [-1] * (L - len(row)) for row in numbers])


def inputs(document, Hq=4, Hkv=2, D=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(*document.shape, H, D) for H in (Hq, Hkv, Hkv)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def results(function, qkv, document, where, **arguments):
    """The result at the documents' tokens, and the gradients of q, k and v."""
    weight = torch.randn(qkv[0].shape, generator=torch.Generator().manual_seed(1), dtype=qkv[0].dtype)
    out = function(*qkv, where, **arguments)[document >= 0]
    return [out, *torch.autograd.grad((out * weight[document >= 0]).sum(), qkv)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_documents_attend_as_under_a_block_diagonal_causal_mask(rows, dtype, tolerance):
    document = documents(rows)
    qkv = inputs(document, dtype=dtype)
    got = results(packed_attention, qkv, document, packing_tables(document))
    want = results(packed_attention_reference, qkv, document, document)
    for ours, reference in zip(got, want, strict=True):
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("heads", [(3, 3), (4, 1)])
def test_head_counts_and_softmax_scale(heads):
    document = documents(ROWS["ragged"])
    qkv = inputs(document, *heads)
    got = results(packed_attention, qkv, document, packing_tables(document), softmax_scale=0.7)
    want = results(packed_attention_reference, qkv, document, document, softmax_scale=0.7)
    for ours, reference in zip(got, want, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


def test_random_packings_of_long_rows():
    generator = torch.Generator().manual_seed(3)
    for L in (7, 64, 300):
        rows = []
        for _ in range(5):
            row = [1 + int(torch.randint(L, (1,), generator=generator) ** 2 / L)]
            while sum(row) < L:
                row.append(1 + int(torch.randint(L, (1,), generator=generator) ** 2 / L))
            rows.append(row[:-1])
        document = documents(rows, L)
        qkv = inputs(document)
        got = results(packed_attention, qkv, document, packing_tables(document))
        want = results(packed_attention_reference, qkv, document, document)
        for ours, reference in zip(got, want, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


def test_padding_reaches_nothing_and_comes_out_as_zero():
    document = documents([[], [5, 20], [40]])
    qkv = inputs(document)
    want = packed_attention(*qkv, packing_tables(document))
    with torch.no_grad():
        for x in qkv:
            x[document < 0] = float("nan")
    got = packed_attention(*qkv, packing_tables(document))
    assert torch.equal(got, want)
    assert not got[document < 0].any()
    for gradient in torch.autograd.grad(got.sum(), qkv):
        assert gradient.isfinite().all()
        assert not gradient[document < 0].any()


def test_a_batch_of_nothing_but_padding_is_finite():
    document = documents([[], []])
    qkv = inputs(document)
    out = packed_attention(*qkv, packing_tables(document))
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), qkv))


def test_gradients_are_those_of_finite_differences():
    document = documents([[3, 2], [4]], 6)
    qkv = inputs(document, 2, 1, 16)
    tables = packing_tables(document)
    assert torch.autograd.gradcheck(lambda *x: packed_attention(*x, tables), qkv)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_tables_lead_there_and_back(rows):
    document = documents(rows)
    B, L = document.shape
    tables = packing_tables(document)
    assert all(table.shape[0] == B and table.dtype == torch.int64 for table in tables.values())
    sizes = sorted(int(name.removeprefix("unpack_")) for name in tables if name != "repack")
    flat = [tables[f"unpack_{M}"].flatten() for M in sizes]
    joined = torch.cat([x[: len(x) // M * M] for x, M in zip(flat, sizes, strict=True)])
    position = torch.arange(B * L).view(B, L)
    assert torch.equal(joined[tables["repack"]][document >= 0], position[document >= 0])
    assert all(x.min() >= 0 and x.max() < B * L for x in flat)


def test_a_document_takes_the_smallest_bucket_that_holds_it():
    tables = packing_tables(documents([[16, 17, 1], [40], [33, 2]]))
    assert {name: table.numel() for name, table in tables.items()} == {
        "unpack_16": 3 * 16,  # of 16, 1 and 2 tokens
        "unpack_32": 33,  # of 17, and one place more, for a whole number a row
        "unpack_40": 81,  # of 40 and 33: no bucket is longer than a row
        "repack": 120,
    }


@pytest.mark.parametrize(
    ("message", "document"),
    [
        ("int64 .B, L., not empty; got torch.float32", torch.zeros(2, 3)),
        (r"not empty; got torch.int64 \[0, 3\]", torch.zeros(0, 3, dtype=torch.int64)),
        (r"not empty; got torch.int64 \[3\]", torch.zeros(3, dtype=torch.int64)),
        ("row 1 has 2 at 2, after 0", torch.tensor([[0, 0, 1], [0, 0, 2]])),
        ("row 0 has 0 at 2, after 1", torch.tensor([[0, 1, 0]])),
        ("row 0 has 0 at 1, after -1", torch.tensor([[-1, 0, 0]])),
        ("row 0 has 1 at 0", torch.tensor([[1, 1, 1]])),
        ("row 0 has -2 at 1, after 0", torch.tensor([[0, -2, -2]])),
    ],
)
def test_what_is_no_numbering_of_documents_is_refused(message, document):
    with pytest.raises(ValueError, match=message):
        packing_tables(document)


def test_what_does_not_go_together_is_refused():
    document = documents(ROWS["ragged"])
    q, k, v = inputs(document)
    tables = packing_tables(document)
    for message, arguments in (
        (r"v must be \[batch, sequence, heads, head_dim\], of one batch and sequence", (q, k, v[:, :5], tables)),
        (r"q must be \[batch", (q[0], k, v, tables)),
        (r"tables\['repack'\] must be int64 \[2, 40\]", (q[:2], k[:2], v[:2], tables)),
        (
            r"tables\['repack'\] must be int64 .* got torch.int32",
            (q, k, v, tables | {"repack": tables["repack"].int()}),
        ),
        ("tables must be those of packing_tables", (q, k, v, {"repack": tables["repack"]})),
        ("must be a multiple of the", (q[:, :, :3], k, v, tables)),
    ):
        with pytest.raises(ValueError, match=message):
            packed_attention(*arguments)


@pytest.mark.parametrize("scale", [torch.tensor(0.25), torch.ones(2), True, float("nan"), float("inf"), 0, "1"])
def test_a_scale_that_is_no_number_above_0_is_refused(scale):
    document = documents([[4, 3]])
    with pytest.raises(ValueError, match="softmax_scale must be a number, finite and above 0; got"):
        packed_attention(*inputs(document), packing_tables(document), softmax_scale=scale)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_padding_and_what_comes_back_to_it_reach_no_gradient(value):
    document = documents([[5, 4], [12, 3]])
    padding = (document < 0)[..., None, None]
    tables, results = packing_tables(document), []
    for filling in (value, 0.0):
        qkv = [x.detach().masked_fill(padding, filling).requires_grad_() for x in inputs(document)]
        out = packed_attention(*qkv, tables)
        upstream = torch.ones_like(out).masked_fill(padding, filling)
        results.append([out.detach(), *torch.autograd.grad(out, qkv, upstream)])
    for ours, clean in zip(*results, strict=True):
        torch.testing.assert_close(ours, clean, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_on_a_gpu_too(rows, dtype, tolerance):
    document = documents(rows)
    tables, rounded = packing_tables(document), [x.detach().to(dtype) for x in inputs(document)]
    want = results(packed_attention, [x.double().requires_grad_() for x in rounded], document, tables)
    on_gpu = [x.cuda().requires_grad_() for x in rounded]
    weight = torch.randn(on_gpu[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out = packed_attention(*on_gpu, {name: table.cuda() for name, table in tables.items()})[document.cuda() >= 0]
    gradients = torch.autograd.grad((out * weight.cuda()[document.cuda() >= 0].to(dtype)).sum(), on_gpu)
    for ours, reference in zip([out, *gradients], want, strict=True):
        torch.testing.assert_close(ours.double().cpu(), reference, rtol=tolerance, atol=tolerance)
