"""Every function of the package: second derivatives and forward mode are right, or errors that name the function."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from trunkline.kernels import triton_path
from trunkline.kernels.attention import flash_attention, packed_attention, packing_tables
from trunkline.kernels.linear_cross_entropy import linear_cross_entropy
from trunkline.kernels.linear_masked_mse import linear_masked_mse
from trunkline.kernels.masked_mse import masked_mse

MASK = torch.tensor([True, False, True])
TARGETS = torch.tensor([1, -100, 2])
TABLES = packing_tables(torch.tensor([[0, 1, -1]]))


class Case(NamedTuple):
    name: str  # of the function
    call: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    smooth_on_cpu: bool = False  # where torch's operators do it, they have every derivative

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator).requires_grad_() for shape in self.shapes]


ATTENTION = ((1, 3, 1, 16),) * 3
HEAD = ((3, 4), (6, 4), (6,))
CASES = {
    "full": Case("flash_attention", flash_attention, ATTENTION),
    "causal": Case("flash_attention", lambda q, k, v: flash_attention(q, k, v, causal_block=2), ATTENTION),
    "packed": Case("packed_attention", lambda q, k, v: packed_attention(q, k, v, TABLES), ATTENTION),
    "mse": Case("masked_mse", lambda p, t: masked_mse(p, t, MASK)[0], ((2, 3), (2, 3)), True),
    "mse, no mask": Case("masked_mse", lambda p, t: masked_mse(p, t)[0], ((2, 3), (2, 3)), True),
    "linear mse": Case(
        "linear_masked_mse", lambda *x: linear_masked_mse(*x, MASK)[0], ((3, 4), (4,), (1,), (3,)), True
    ),
    "entropy": Case("linear_cross_entropy", lambda h, w, b: linear_cross_entropy(h, w, TARGETS, bias=b), HEAD),
    "entropy, no bias": Case("linear_cross_entropy", lambda h, w: linear_cross_entropy(h, w, TARGETS), HEAD[:2]),
    "entropy of rows": Case(
        "linear_cross_entropy", lambda h, w, b: linear_cross_entropy(h, w, TARGETS, bias=b, reduction="none"), HEAD
    ),
}


@pytest.fixture(params=["torch", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What computes on the CPU: operators of torch, or the kernels, interpreted."""
    if request.param == "triton" and triton_path.triton is None:
        pytest.skip("needs Triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # for what Triton imports when it is first needed
    monkeypatch.setattr(triton_path, "INTERPRETED", request.param == "triton")
    return request.param


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def refusing(case: Case, why: str) -> Any:
    return pytest.raises(RuntimeError, match=f"{case.name} {why}")


def test_second_derivatives_are_right_or_refused_in_every_pair_of_inputs(case: Case, path: str) -> None:
    inputs = case.inputs()
    if case.smooth_on_cpu and path == "torch":
        wide = [x.detach().double().requires_grad_() for x in inputs]
        assert torch.autograd.gradgradcheck(case.call, wide)
        return
    for upstream in (1, 2):  # a gradient of the output that is a constant, and one that depends on the inputs
        loss = case.call(*inputs).pow(upstream).sum()
        gradients = torch.autograd.grad(loss, inputs, create_graph=True)
        for gradient, x in itertools.product(gradients, inputs):
            with refusing(case, "is differentiable once"):
                torch.autograd.grad(gradient.square().sum(), x, retain_graph=True, allow_unused=True)
        with refusing(case, "is differentiable once"):
            (loss + gradients[0].square().sum()).backward()


def test_a_derivative_in_the_gradient_of_the_output_is_no_silent_zero(case: Case, path: str) -> None:
    """The trick that makes forward mode of two backward passes."""
    inputs = tuple(x.detach() for x in case.inputs())
    tangents = tuple(torch.ones_like(x) for x in inputs)
    if case.smooth_on_cpu and path == "torch":
        got = torch.autograd.functional.jvp(case.call, inputs, tangents)[1]
        torch.testing.assert_close(got, torch.func.jvp(case.call, inputs, tangents)[1])
        return
    with refusing(case, "is differentiable once"):
        torch.autograd.functional.jvp(case.call, inputs, tangents)


@pytest.mark.parametrize("grad", [True, False])
def test_a_tangent_of_any_input_counts_or_is_refused(case: Case, path: str, grad: bool) -> None:
    inputs = case.inputs()
    for i, x in enumerate(inputs):
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            duals = [*inputs[:i], forward_ad.make_dual(x.detach(), torch.ones_like(x)), *inputs[i + 1 :]]
            if case.smooth_on_cpu and path == "torch":
                tangent = forward_ad.unpack_dual(case.call(*duals)).tangent
                with torch.enable_grad():
                    slope = torch.autograd.grad(case.call(*inputs), x)[0].sum()
                torch.testing.assert_close(tangent, slope)
                continue
            with refusing(case, "has no forward-mode derivative"):
                case.call(*duals)


def test_transforms_of_functions_are_no_silent_zeros(case: Case, path: str) -> None:
    inputs = [x.detach() for x in case.inputs()]
    smooth = case.smooth_on_cpu and path == "torch"
    of_first = lambda x: case.call(x, *inputs[1:]).square().sum()  # noqa: E731
    for call in (
        lambda: torch.func.jvp(of_first, (inputs[0],), (torch.ones_like(inputs[0]),))[1],
        lambda: torch.func.hessian(of_first)(inputs[0]),
        lambda: torch.func.jacrev(torch.func.grad(of_first))(inputs[0]),
    ):
        if smooth:
            assert call().any()
        else:
            with pytest.raises(RuntimeError):
                call()


@pytest.mark.parametrize("name", ["full", "causal", "mse", "linear mse"])
def test_vmap_gives_what_a_loop_gives(name: str, path: str) -> None:
    call = CASES[name].call
    inputs = [torch.stack([x.detach(), 2 * x.detach()]) for x in CASES[name].inputs()]
    want = torch.stack([call(*(x[i] for x in inputs)) for i in range(2)])
    torch.testing.assert_close(torch.func.vmap(call)(*inputs), want)


def test_a_retained_graph_gives_its_gradients_twice_also_with_create_graph(case: Case, path: str) -> None:
    inputs = case.inputs()
    loss = case.call(*inputs).square().sum()
    want = torch.autograd.grad(loss, inputs, retain_graph=True)
    with_graph = torch.autograd.grad(loss, inputs, create_graph=True)
    again = torch.autograd.grad(loss, inputs)
    for a, b, c in zip(want, with_graph, again, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)


@pytest.mark.parametrize("change", [lambda out: out.div_(2), lambda out: out.add_(3), lambda out: out.exp_()])
@pytest.mark.parametrize("name", [name for name in CASES if name != "full"])
def test_an_output_that_is_changed_in_place_still_has_its_gradients(
    name: str, path: str, change: Callable[[Tensor], Tensor]
) -> None:
    """As `loss /= n` does."""
    if path == "triton" and not name.startswith(("packed", "entropy")):
        pytest.skip("torch refuses the change: the output is needed for the gradients, or a view")
    inputs, call = CASES[name].inputs(), CASES[name].call
    want = torch.autograd.grad(change(call(*inputs).clone()).sum(), inputs)
    got = torch.autograd.grad(change(call(*inputs)).sum(), inputs)
    for ours, reference in zip(got, want, strict=True):
        torch.testing.assert_close(ours, reference)


def test_frozen_inputs_stay_frozen(case: Case, path: str) -> None:
    """No gradient is computed for them, nor memory taken for it."""
    inputs = case.inputs()
    want = torch.autograd.grad(case.call(*inputs).sum(), inputs[0])[0]
    loss = case.call(inputs[0], *(x.detach() for x in inputs[1:])).sum()
    torch.testing.assert_close(torch.autograd.grad(loss, inputs[0])[0], want)
    assert not case.call(*(x.detach() for x in inputs)).requires_grad
