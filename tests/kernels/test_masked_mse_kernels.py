"""The Triton kernels of masked_mse and linear_masked_mse, interpreted on the CPU and, with `-m gpu`, on the GPU."""

import importlib
import itertools
import random

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from trunkline.kernels.column_sums import column_sums
from trunkline.kernels.linear_masked_mse import linear_masked_mse
from trunkline.kernels.masked_mse import masked_mse
from trunkline.kernels.reference import linear_masked_mse_reference, masked_mse_reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def draw(shape, seed=0, dtype=torch.float32, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def some(shape, device, seed=9):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.4).to(device)


def masked_inputs(shape, dtype=torch.float32, device="cpu"):
    return [draw(shape, seed, dtype, device).requires_grad_() for seed in (0, 1)]


def linear_inputs(shape, d, dtype=torch.float32, device="cpu"):
    shapes = ((*shape, d), (d,), (1,), shape)
    return [draw(x, seed, dtype, device).requires_grad_() for seed, x in enumerate(shapes)]


def results(function, leaves, mask):
    """sum, count and the gradients of all leaves."""
    total, count = function(*leaves, mask)
    return [total.detach(), count, *torch.autograd.grad(total, leaves)]


def plain_masked_mse(pred, target, mask):
    weights = torch.ones_like(pred) if mask is None else mask.to(pred.dtype).expand(pred.shape)
    return (weights * (pred - target).square()).sum(), weights.float().sum()


def plain_linear_masked_mse(hidden, weight, bias, target, mask):
    return plain_masked_mse(hidden @ weight + bias, target, mask)


def assert_as_accurate(function, plain, reference, leaves, mask):
    """By norms, no result is over twice as far from the fp64 reference as plain torch in the same dtype.

    Plain torch is lucky at times, so its own rounding is granted to every result (a whole step of its dtype, since the
    interpreter rounds fp32 to bf16 towards zero), and some rounding of fp32 to what it adds up.
    """
    wide = [x.detach().double().requires_grad_() for x in leaves]
    ours, theirs, truths = results(function, leaves, mask), results(plain, leaves, mask), results(reference, wide, mask)
    summands = truths[-1].abs().sum()
    for got, usual, truth in zip(ours, theirs, truths, strict=True):
        ours_error, theirs_error = ((x.double() - truth).norm() for x in (got, usual))
        rounding = torch.finfo(got.dtype).eps * truth.norm() + 5e-7 * (truth.norm() + summands)
        assert ours_error <= 2 * theirs_error + rounding


def masks(shape, device):
    weights = draw(shape, 5, device=device).clamp(min=0)
    return {
        "none": None,
        "bool": some(shape, device),
        "float": weights,
        "bf16": weights.bfloat16(),
        "row": some(shape[-1:], device),
        "column": some((*shape[:-1], 1), device),
        "middle": some((shape[0], 1, *shape[2:]), device),
        "nothing": torch.zeros(shape, dtype=torch.bool, device=device),
    }


KINDS_AND_DTYPES = [  # each kind in one dtype, and in the others with -m slow
    pytest.param(kind, dtype, marks=[pytest.mark.slow] * ((i + j) % 3 != 0))
    for i, kind in enumerate(["none", "bool", "float", "bf16", "row", "column", "middle", "nothing"])
    for j, dtype in enumerate(DTYPES)
]


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES)
def test_masked_mse_is_as_accurate_as_plain_torch_in_the_same_dtype(device, dtype, kind):
    for shape in [(2, 3, 56), (3, 5, 7), (2, 2, 4100)]:
        mask = masks(shape, device)[kind]
        leaves = masked_inputs(shape, dtype, device)
        assert_as_accurate(masked_mse, plain_masked_mse, masked_mse_reference, leaves, mask)


@pytest.mark.parametrize(("kind", "dtype"), KINDS_AND_DTYPES)
def test_linear_masked_mse_is_as_accurate_as_plain_torch_in_the_same_dtype(device, dtype, kind):
    for shape, d in [((3, 11, 9), 16), ((3, 11, 9), 100), ((2, 3, 5), 384), ((2, 3), 700), ((2, 1, 3), 2049)]:
        mask = masks(shape, device)[kind]
        leaves = linear_inputs(shape, d, dtype, device)
        assert_as_accurate(linear_masked_mse, plain_linear_masked_mse, linear_masked_mse_reference, leaves, mask)


# a few at a time, so that several processes share what a GPU's kernels take to compile; fresh ones with -m slow
@pytest.mark.usefixtures("overflows_are_found")
@pytest.mark.parametrize(
    ("seed", "count"),
    [
        *((seed, 10) for seed in range(2)),
        *(pytest.param(seed, 10, marks=pytest.mark.slow) for seed in range(2, 10)),
        pytest.param(None, 200, marks=pytest.mark.slow),
    ],
)
def test_random_configurations(device, seed, count):
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    print(f"random configurations of seed {seed}")
    rng = random.Random(seed)
    for _ in range(count if device.type == "cpu" else 2 * count // 5):  # a GPU's kernels are compiled for most of them
        shape = [rng.choice((1, 2, 3, 5, 8, 17, 63)) for _ in range(rng.randint(1, 4))]
        shape[-1] = rng.choice((1, 7, 16, 123, 250))
        while torch.Size(shape).numel() > 10_000:
            shape[shape.index(max(shape))] = 1
        kept = rng.randint(0, len(shape))
        mask_shape = [rng.choice((1, size)) for size in shape[kept:]]
        mask = rng.choice((None, some(mask_shape, device), draw(mask_shape, 7, device=device).clamp(min=0)))
        dtype, d = rng.choice(DTYPES), rng.choice((1, 3, 32, 129, 256))
        print(shape, None if mask is None else (mask_shape, mask.dtype), dtype, d)
        leaves = masked_inputs(shape, dtype, device)
        if rng.random() < 0.5:
            leaves = [x.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_() for x in leaves]
        assert_as_accurate(masked_mse, plain_masked_mse, masked_mse_reference, leaves, mask)
        if torch.Size(shape).numel() * d < 100_000:
            leaves = linear_inputs(shape, d, dtype, device)
            assert_as_accurate(linear_masked_mse, plain_linear_masked_mse, linear_masked_mse_reference, leaves, mask)


def test_every_way_of_broadcasting_a_mask(device):
    shape = (2, 3, 4, 5)
    leaves = masked_inputs(shape, device=device)
    for sizes in itertools.product(*((1, size) for size in shape)):
        for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
            back = [order.index(i) for i in range(4)]
            mask = some([sizes[i] for i in order], device).permute(back)
            assert mask.shape == sizes
            got, want = results(masked_mse, leaves, mask), results(masked_mse, leaves, mask.expand(shape).contiguous())
            torch.testing.assert_close(got, want)
    every_other = some((2, 3, 4, 10), device)[..., ::2]
    torch.testing.assert_close(
        results(masked_mse, leaves, every_other), results(masked_mse, leaves, every_other.contiguous())
    )


@pytest.mark.parametrize("sizes", [(), (7,), (5, 7), (3, 1, 7), (3, 5, 1), (3, 5, 7), (1, 5, 1), (3, 1, 1)])
def test_a_broadcast_mask_is_not_copied(device, sizes):
    mask = some(sizes, device)
    layout = importlib.import_module("trunkline.kernels.masked_mse")._mask_layout
    assert layout(mask, torch.Size((3, 5, 7)))[0].data_ptr() == mask.data_ptr()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, of inf - inf in the interpreter
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["bool", "float", "row", "nothing"])
def test_what_is_masked_touches_no_result(device, garbage, kind):
    shape = (3, 5, 40)
    mask = masks(shape, device)[kind]
    off = (mask == 0).expand(shape)
    pred, target = masked_inputs(shape, device=device)
    spoiled = [x.detach().masked_fill(off, garbage).requires_grad_() for x in (pred, target)]
    for got, want in zip(results(masked_mse, spoiled, mask), results(masked_mse, (pred, target), mask), strict=True):
        assert torch.equal(got, want)
    hidden, weight, bias, target = linear_inputs(shape, 24, device=device)
    spoiled = [
        hidden.detach().masked_fill(off[..., None], garbage),
        weight,
        bias,
        target.detach().masked_fill(off, garbage),
    ]
    spoiled = [x.detach().requires_grad_() for x in spoiled]
    got = results(linear_masked_mse, spoiled, mask)
    for a, b in zip(got, results(linear_masked_mse, (hidden, weight, bias, target), mask), strict=True):
        assert torch.equal(a, b)
    assert (got[2][off] == 0).all()


def test_a_nan_that_counts_shows(device):
    pred, target = masked_inputs((4, 40), device=device)
    pred.data[1, 3] = float("nan")
    total, count, grad_pred, grad_target = results(masked_mse, (pred, target), None)
    assert total.isnan()
    assert count == 160
    assert grad_pred.isnan().sum() == grad_target.isnan().sum() == 1


def test_inputs_need_not_be_contiguous(device):
    pred, target = (x.detach().T.requires_grad_() for x in masked_inputs((40, 6), device=device))
    mask = some((40, 6), device).T
    straight = [x.detach().contiguous().requires_grad_() for x in (pred, target)]
    for a, b in zip(
        results(masked_mse, (pred, target), mask), results(masked_mse, straight, mask.contiguous()), strict=True
    ):
        assert torch.equal(a, b)
    hidden, weight, bias, target = linear_inputs((4, 9), 48, device=device)
    turned = hidden.detach().transpose(0, 2).contiguous().transpose(0, 2)
    wider = torch.cat([hidden.detach(), hidden.detach()], dim=-1)[..., :48]
    want = results(linear_masked_mse, (hidden, weight, bias, target), None)
    for view in (turned, wider):
        assert not view.is_contiguous()
        leaves = (view.requires_grad_(), weight, bias, target)
        for a, b in zip(results(linear_masked_mse, leaves, None), want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_no_rows(device, shape):
    for function, leaves in (
        (masked_mse, masked_inputs(shape, device=device)),
        (linear_masked_mse, linear_inputs(shape, 32, device=device)),
    ):
        for mask in (None, torch.ones(shape, device=device)):
            total, count, *gradients = results(function, leaves, mask)
            assert total == count == 0
            assert all((g == 0).all() and g.shape == x.shape for g, x in zip(gradients, leaves, strict=True))


def test_dtypes_may_differ_and_gradients_have_their_own(device):
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float32)
    leaves = [x.detach().to(t).requires_grad_() for x, t in zip(linear_inputs((3, 7), 32, device=device), dtypes)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    got, want = results(linear_masked_mse, leaves, None), results(linear_masked_mse_reference, wide, None)
    assert tuple(g.dtype for g in got[2:]) == dtypes
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-2)
    with torch.autocast(device.type, torch.bfloat16):
        for a, b in zip(results(linear_masked_mse, leaves, None), got, strict=True):
            assert torch.equal(a, b)


def test_only_what_is_asked_for_is_computed(device):
    mask = some((4, 40), device)
    for function, leaves in (
        (masked_mse, masked_inputs((4, 40), device=device)),
        (linear_masked_mse, linear_inputs((4, 40), 32, device=device)),
    ):
        all_of_them = results(function, leaves, mask)[2:]
        for chosen in itertools.product((False, True), repeat=len(leaves)):
            if any(chosen):
                inputs = [x.detach().requires_grad_(need) for x, need in zip(leaves, chosen, strict=True)]
                function(*inputs, mask)[0].backward()
                for x, want in zip(inputs, all_of_them, strict=True):
                    assert torch.equal(x.grad, want) if x.requires_grad else x.grad is None


def test_the_upstream_gradient_scales_and_the_count_has_none(device):
    pred, target = masked_inputs((4, 40), device=device)
    total, count = masked_mse(pred, target)
    assert not count.requires_grad
    (mean_gradient,) = torch.autograd.grad(3 * total / count, pred)
    torch.testing.assert_close(mean_gradient, 6 * (pred - target).detach() / 160)


def test_the_same_bits_in_every_run(device):
    for function, leaves in (
        (masked_mse, masked_inputs((20, 1000), torch.bfloat16, device)),
        (linear_masked_mse, linear_inputs((4, 40), 256, torch.bfloat16, device)),
    ):
        mask = some(leaves[-1].shape, device)
        first = results(function, leaves, mask)
        for again in (results(function, leaves, mask) for _ in range(2)):
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_counts_of_many_programs_stay_exact(device):
    partials = torch.full((2000, 33), 8191.0, device=device)
    partials[:, 1] = 1
    sums = column_sums(partials)
    assert sums[0] == 2000 * 8191
    assert sums[1] == 2000
    assert (sums[2:] == sums[0]).all()


def test_the_operators_keep_the_rules_of_torch_library(device):
    pred, target = (x.detach() for x in masked_inputs((3, 40), torch.bfloat16, device))
    for arguments in ((pred, target, some((40,), device)), (pred, target, None)):
        torch.library.opcheck(torch.ops.trunkline.masked_mse.default, arguments)
        for needs in ((True, True), (True, False), (False, True)):
            backward = torch.ops.trunkline.masked_mse_backward.default
            torch.library.opcheck(backward, (torch.ones(2, device=device), *arguments, *needs))
    leaves = [x.detach() for x in linear_inputs((3, 5), 32, torch.bfloat16, device)]
    for arguments in ((*leaves, some((3, 5), device)), (*leaves, None)):
        torch.library.opcheck(torch.ops.trunkline.linear_masked_mse.default, arguments)
    hidden, weight, _, target = leaves
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        given = (torch.ones(2, device=device), hidden, weight, target.float(), target.dtype, *needs)
        torch.library.opcheck(torch.ops.trunkline.linear_masked_mse_backward.default, given)


@pytest.mark.parametrize("function", [masked_mse, linear_masked_mse])
def test_compiles_without_graph_breaks(device, function):
    shape = (3, 40)
    inputs = masked_inputs(shape, device=device) if function is masked_mse else linear_inputs(shape, 32, device=device)
    mask = some((40,), device)
    compiled = torch.compile(function, fullgraph=True)
    for a, b in zip(results(compiled, inputs, mask), results(function, inputs, mask), strict=True):
        assert torch.equal(a, b)


def test_activation_checkpointing_changes_nothing(device):
    leaves = linear_inputs((3, 40), 32, device=device)
    mask = some((3, 40), device)
    again = lambda *x: checkpoint(linear_masked_mse, *x, use_reentrant=False)  # noqa: E731
    for a, b in zip(results(again, leaves, mask), results(linear_masked_mse, leaves, mask), strict=True):
        assert torch.equal(a, b)


def test_fp64_takes_torchs_operators(device):
    leaves = [x.detach().double().requires_grad_() for x in linear_inputs((2, 3), 8, device=device)]
    assert linear_masked_mse(*leaves)[0].dtype == torch.float64
    assert torch.autograd.gradcheck(lambda *x: linear_masked_mse(*x)[0], leaves)


@pytest.mark.gpu
@pytest.mark.large
def test_more_than_2_to_the_31_values():
    size = 2**31 + 4104
    pred = torch.zeros(size, dtype=torch.bfloat16, device="cuda")
    pred[-3:] = 2
    pred.requires_grad_()
    total, count = masked_mse(pred, torch.zeros_like(pred))
    assert total == 12
    assert count == float(torch.tensor(size, dtype=torch.float32))
    total.backward()
    assert pred.grad[-4:].tolist() == [0, 4, 4, 4]
    assert pred.grad.count_nonzero() == 3


@pytest.mark.gpu
@pytest.mark.large
def test_more_than_2_to_the_31_hidden_values():
    rows, d = 2**23 + 77, 256
    hidden = torch.zeros(rows, d, dtype=torch.bfloat16, device="cuda")
    hidden[-1] = 1
    hidden.requires_grad_()
    weight = torch.ones(d, device="cuda", requires_grad=True)
    total, count = linear_masked_mse(hidden, weight, torch.zeros(1, device="cuda"), torch.zeros(rows, device="cuda"))
    assert total == d**2
    assert count == rows
    total.backward()
    assert (hidden.grad[-1] == 2 * d).all()
    assert hidden.grad[:-1].count_nonzero() == 0
    assert (weight.grad == 2 * d).all()
