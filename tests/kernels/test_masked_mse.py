"""masked_mse and linear_masked_mse against their definitions."""

import re

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from trunkline.kernels.linear_masked_mse import linear_masked_mse
from trunkline.kernels.masked_mse import masked_mse
from trunkline.kernels.reference import linear_masked_mse_reference, masked_mse_reference


def values(shape=(3, 5, 7), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pred, target = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return pred.requires_grad_(), target


def masks(shape=(3, 5, 7)):
    draw = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    return {
        "none": None,
        "bool": draw > 0.5,
        "float": draw * (draw > 0.3),
        "broadcast": draw[:1, ..., :1] > 0.4,
        "fewer dimensions": draw[(0,) * (len(shape) - 1)] > 0.5,
        "nothing": torch.zeros(shape, dtype=torch.bool),
    }


@pytest.mark.parametrize("kind", masks())
def test_equals_the_reference_in_fp64(kind):
    pred, target = values(dtype=torch.float64)
    mask = masks()[kind]
    got, want = masked_mse(pred, target, mask), masked_mse_reference(pred, target, mask)
    torch.testing.assert_close(got, want)
    (dg,) = torch.autograd.grad(got[0], pred)
    (dw,) = torch.autograd.grad(want[0], pred)
    torch.testing.assert_close(dg, dw)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", masks())
def test_accumulates_in_fp32(dtype, kind):
    pred, target = values(dtype=dtype)
    total, count = masked_mse(pred, target, masks()[kind])
    assert total.dtype == count.dtype == torch.float32
    assert total.shape == count.shape == ()
    want = masked_mse_reference(pred.detach().double(), target.double(), masks()[kind])
    torch.testing.assert_close((total.double(), count.double()), want, rtol=1e-6, atol=0)


def test_a_long_bf16_sum_does_not_stall():
    ones = torch.ones(100_000, dtype=torch.bfloat16)
    total, count = masked_mse(ones, torch.zeros_like(ones))
    assert total == 100_000
    assert count == 100_000


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masked_values_touch_neither_the_sum_nor_the_gradient(garbage, kind):
    pred, target = values()
    mask = masks()[kind]
    spoiled = target.masked_fill(mask == 0, garbage)
    got, want = masked_mse(pred, spoiled, mask), masked_mse(pred, target, mask)
    assert got == want
    (gradient,) = torch.autograd.grad(got[0], pred)
    assert torch.equal(gradient, torch.autograd.grad(want[0], pred)[0])
    assert (gradient[mask == 0] == 0).all()


def test_no_rows():
    pred, target = values((0, 4))
    total, count = masked_mse(pred, target, torch.ones(0, 4))
    assert (total, count) == (0, 0)
    assert torch.autograd.grad(total, pred)[0].shape == (0, 4)


def test_inputs_need_not_be_contiguous():
    pred, target = values((6, 8))
    mask = masks((6, 8))["bool"]
    got = masked_mse(pred.T, target.T, mask.T)
    torch.testing.assert_close(got, masked_mse(pred, target, mask))


def linear_inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    shapes = ((2, 5, 8), (8,), (1,), (2, 5))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("masked", [False, True])
def test_linear_masked_mse_equals_its_reference(masked):
    leaves = linear_inputs()
    mask = masks((2, 5))["bool"] if masked else None
    got, want = linear_masked_mse(*leaves, mask), linear_masked_mse_reference(*leaves, mask)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got[0], leaves), torch.autograd.grad(want[0], leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    pred, target = values((2, 3), torch.float64)
    mask = torch.tensor([1.0, 0.0, 0.5])
    assert torch.autograd.gradcheck(lambda p, t: masked_mse(p, t, mask)[0], (pred, target.requires_grad_()))
    assert torch.autograd.gradcheck(lambda *x: linear_masked_mse(*x, mask=masks((2, 5))["float"])[0], linear_inputs())


def test_linear_masked_mse_ignores_a_missing_target():
    hidden, weight, bias, target = (x.detach() for x in linear_inputs(torch.float32))
    hidden.requires_grad_()
    mask = masks((2, 5))["bool"]
    total, count = linear_masked_mse(hidden, weight, bias, target.masked_fill(~mask, float("nan")), mask)
    assert (total, count) == linear_masked_mse(hidden, weight, bias, target, mask)
    assert (torch.autograd.grad(total, hidden)[0][~mask] == 0).all()


def test_compiles_without_graph_breaks():
    leaves = linear_inputs()
    mask = masks((2, 5))["float"]
    compiled = torch.compile(linear_masked_mse, fullgraph=True, backend="aot_eager")
    got, want = compiled(*leaves, mask), linear_masked_mse(*leaves, mask)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got[0], leaves), torch.autograd.grad(want[0], leaves))


def test_activation_checkpointing_changes_nothing():
    leaves = linear_inputs()
    want = torch.autograd.grad(linear_masked_mse(*leaves)[0], leaves)
    got = torch.autograd.grad(checkpoint(linear_masked_mse, *leaves, use_reentrant=False)[0], leaves)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


BAD = {
    "target must be [3, 5, 7] to go with pred; got [3, 1, 7]": lambda p, t: masked_mse(p, t[:, :1]),
    "target must be [3, 5] to go with hidden": lambda p, t: linear(p, t),
    "pred must be floating": lambda p, t: masked_mse(p.int(), t),
    "target must be floating": lambda p, t: masked_mse(p, t.int()),
    "hidden must be floating": lambda p, t: linear(p.int(), t[..., 0]),
    "mask must be a tensor; got a list": lambda p, t: masked_mse(p, t, [True] * 7),
    "mask must be a tensor; got a float": lambda p, t: linear(p, t[..., 0], mask=1.0),
    "mask must be bool or floating": lambda p, t: masked_mse(p, t, torch.ones(7, dtype=torch.int32)),
    "mask must broadcast": lambda p, t: masked_mse(p, t, torch.ones(4)),
    "weight must be [7]": lambda p, t: linear(p, t[..., 0], weight=torch.ones(3)),
    "target is on meta, pred on cpu": lambda p, t: masked_mse(p, t.to("meta")),
    "mask is on meta, pred on cpu": lambda p, t: masked_mse(p, t, torch.ones(7, device="meta")),
    "target is on meta, hidden on cpu": lambda p, t: linear(p, t[..., 0].to("meta")),
    "mask is on meta, hidden on cpu": lambda p, t: linear(p, t[..., 0], mask=torch.ones(5, device="meta")),
    "weight is on meta, hidden on cpu": lambda p, t: linear(p, t[..., 0], weight=torch.ones(7, device="meta")),
    "bias is on meta, hidden on cpu": lambda p, t: linear(p, t[..., 0], bias=torch.ones(1, device="meta")),
    "weight is on cpu, hidden on meta": lambda p, t: linear(p.to("meta"), t[..., 0]),
    "weight must be floating": lambda p, t: linear(p, t[..., 0], weight=torch.ones(7).int()),
    "bias must be floating": lambda p, t: linear(p, t[..., 0], bias=torch.ones(1).int()),
    "of at least 1": lambda p, t: linear(p[..., :0], t[..., 0], weight=torch.ones(0)),
    "bias must be one number, of shape [] or [1]; got [2]": lambda p, t: linear(p, t[..., 0], bias=torch.ones(2)),
}


WEIGHT, BIAS = torch.ones(7), torch.ones(1)


def linear(hidden, target, weight=WEIGHT, bias=BIAS, mask=None):
    return linear_masked_mse(hidden, weight, bias, target, mask)


@pytest.mark.parametrize("message", BAD)
def test_arguments_that_do_not_fit_are_named(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BAD[message](*values())


@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["bool", "float", "row"])
def test_hidden_rows_that_do_not_count_reach_no_gradient(garbage, kind):
    """0 x NaN is NaN: a product with a gradient of 0 would not do."""
    (hidden, _), (_, target) = values((4, 5, 7)), values((4, 5))
    mask = {
        "bool": masks((4, 5))["bool"],
        "float": masks((4, 5))["float"],
        "row": torch.tensor([True, False, True, True, False]),
    }[kind]
    weight, bias = torch.randn(7, generator=torch.Generator().manual_seed(5)), torch.tensor(0.3)
    masked = (mask == 0).expand(4, 5)
    gradients = []
    for filling in (garbage, 0.0):
        leaves = [
            hidden.detach().masked_fill(masked[..., None], filling),
            weight,
            bias,
            target.masked_fill(masked, filling),
        ]
        leaves = [x.clone().requires_grad_() for x in leaves]
        total, count = linear_masked_mse(*leaves, mask)
        gradients.append([total.detach(), count, *torch.autograd.grad(total, leaves)])
    for ours, clean in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, clean, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_a_low_hidden_state_with_a_wide_weight(dtype):
    (hidden, _), (_, target) = values((4, 5, 7), dtype=dtype), values((4, 5))
    leaves = [hidden, torch.ones(7).requires_grad_(), torch.zeros(1, dtype=torch.bfloat16).requires_grad_()]
    with torch.autocast("cpu", dtype=dtype):
        total, _ = linear_masked_mse(*leaves, target)
    assert [x.dtype for x in torch.autograd.grad(total, leaves)] == [x.dtype for x in leaves]
    want, _ = linear_masked_mse_reference(*leaves, target)
    torch.testing.assert_close(total, want, rtol=20 * torch.finfo(dtype).eps, atol=0)
