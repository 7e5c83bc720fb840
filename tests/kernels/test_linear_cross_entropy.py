"""linear_cross_entropy against logits written out, its gradients, what it leaves out and the memory it takes."""

import contextlib
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from trunkline.kernels import linear_cross_entropy as module
from trunkline.kernels.linear_cross_entropy import linear_cross_entropy
from trunkline.kernels.reference import linear_cross_entropy_reference


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return torch.device(request.param)


@pytest.fixture
def small_chunks(monkeypatch):
    """At most 3 rows at a time."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 0)
    monkeypatch.setattr(module, "GPU_CHUNK_BYTES", 0)
    monkeypatch.setattr(module, "MIN_ROWS", 3)


def inputs(N=11, V=37, d=16, dtype=torch.float64, device="cpu", ignored=(2, 3, 10), bias=True):
    generator = torch.Generator().manual_seed(0)
    shapes = [(N, d), (V, d), (V,)]
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    values = [x.to(device, dtype).requires_grad_() for x in values]
    targets = torch.randint(V, (N,), generator=generator)
    targets[[i for i in ignored if i < N]] = -100
    return values[0], values[1], values[2] if bias else None, targets.to(device)


def results(function, hidden, weight, bias, targets, **arguments):
    """The loss, and the gradients of hidden, weight and bias for a random gradient of the loss."""
    loss = function(hidden, weight, targets, bias=bias, **arguments)
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, wanted, upstream.to(loss))]


def plain(hidden, weight, targets, *, bias=None, reduction="sum"):
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction=reduction)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("N", [1, 3, 4, 11, 12])
def test_losses_and_gradients_are_those_of_the_definition(small_chunks, device, N, bias, reduction):
    arguments = inputs(N, device=device, bias=bias)
    got = results(linear_cross_entropy, *arguments, reduction=reduction)
    want = results(linear_cross_entropy_reference, *arguments, reduction=reduction)
    for ours, reference in zip(got, want, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradients_are_those_of_finite_differences(small_chunks, reduction):
    hidden, weight, bias, targets = inputs(5, 7, 4, ignored=(1,))
    function = lambda h, w, b: linear_cross_entropy(h, w, targets, bias=b, reduction=reduction)  # noqa: E731
    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_error_is_at_most_twice_that_of_plain_torch(small_chunks, device, dtype, reduction):
    hidden, weight, bias, targets = inputs(64, 300, 32, dtype, device)
    with torch.no_grad():
        weight.div_(4)
    wide = [x.detach().float().requires_grad_() for x in (hidden, weight, bias)]
    got = results(linear_cross_entropy, hidden, weight, bias, targets, reduction=reduction)
    usual = results(plain, hidden, weight, bias, targets, reduction=reduction)
    want = results(linear_cross_entropy_reference, *wide, targets, reduction=reduction)
    for ours, theirs, reference in zip(got, usual, want, strict=True):
        assert ours.dtype == theirs.dtype
        error = (theirs.float() - reference).abs().max()
        if reference.dim() == 0:  # where rows' errors happen to cancel: the size that their sum is expected to have
            with torch.no_grad():
                rows = plain(hidden, weight, targets, bias=bias, reduction="none")
                error = (
                    rows - linear_cross_entropy_reference(*wide[:2], targets, bias=wide[2], reduction="none")
                ).norm()
        assert (ours.float() - reference).abs().max() <= 2 * error + 1e-6 * reference.abs().max()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradients_of_fp16_survive_what_its_range_does_not_hold(device, reduction):
    """Probabilities of 2e-9, which is nothing in fp16 until the loss scale has met them.

    A GPU's products take them times 2^12, in fp16's steps of 2^-24: half a step is 0.4 % of them.
    """
    V, scale = 32, 2.0**16
    targets = torch.arange(V, device=device)
    others = ~torch.eye(V, dtype=torch.bool, device=device)  # 1 - p of the target itself cancels in fp32 already
    gradients = []
    for dtype, function in ((torch.float16, linear_cross_entropy), (torch.float64, linear_cross_entropy_reference)):
        hidden = (20 * torch.eye(V, dtype=dtype, device=device)).requires_grad_()
        weight = torch.eye(V, dtype=dtype, device=device).requires_grad_()
        (function(hidden, weight, targets, reduction=reduction).sum() * scale).backward()
        gradients.append([hidden.grad, weight.grad])
    for ours, reference in zip(*gradients, strict=True):
        assert ours.dtype == torch.float16
        assert 0 < reference[others].max() / scale < 6e-8
        rtol = 1e-3 if device.type == "cpu" else 2.0**-25 / (2.0**12 * math.exp(-20))
        torch.testing.assert_close(ours.double()[others], reference[others], rtol=rtol, atol=0)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_gradients_come_in_that_of_the_inputs(device, dtype, reduction):
    arguments = inputs(dtype=torch.float32, device=device)
    with torch.autocast(device.type, dtype=dtype):
        got = results(linear_cross_entropy, *arguments, reduction=reduction)
    low = [x.detach().to(dtype).float().requires_grad_() for x in arguments[:3]]
    want = results(linear_cross_entropy_reference, *low, arguments[3], reduction=reduction)
    for ours, reference in zip(got, want, strict=True):
        assert ours.dtype == torch.float32
        tolerance = 4 * torch.finfo(dtype).eps * reference.abs().max()
        torch.testing.assert_close(ours, reference, rtol=0, atol=float(tolerance))


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("value", [0.0, math.nan])
def test_what_ignored_rows_hold_does_not_matter(small_chunks, compact, value):
    """Both ways of leaving rows out: before the products, and with weight 0."""
    hidden, weight, bias, targets = inputs()
    row_scale = torch.randn(len(targets), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want = [
        linear_cross_entropy_reference(hidden, weight, targets, bias=bias, reduction="none"),
        *results(linear_cross_entropy_reference, hidden, weight, bias, targets, reduction="none")[1:],
    ]
    with torch.no_grad():
        hidden[targets == -100] = value
        row_scale[targets == -100] = value
        losses, gradients = module._sweep(
            hidden, weight, bias, targets, -100, torch.float64, (True,) * 3, row_scale, compact
        )
    for ours, reference in zip((losses, *gradients), want, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


def test_ignored_rows_on_a_cpu_never_meet_the_weight():
    hidden, weight, _, targets = inputs(100, ignored=range(3, 100), bias=False)
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, targets)
    assert largest.numel == hidden.numel() < 100 * weight.shape[0]


def test_another_ignore_index():
    hidden, weight, bias, targets = inputs(ignored=())
    targets[4] = 7
    got = linear_cross_entropy(hidden, weight, targets, bias=bias, ignore_index=7)
    kept = targets != 7
    want = linear_cross_entropy_reference(hidden[kept], weight, targets[kept], bias=bias)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("N", [0, 4])
def test_without_rows_that_count_losses_and_gradients_are_zero(device, N, reduction):
    arguments = inputs(N, device=device, dtype=torch.float32, ignored=range(N))
    loss, *gradients = results(linear_cross_entropy, *arguments, reduction=reduction)
    assert loss.dtype == torch.float32
    assert list(loss.shape) == ([] if reduction == "sum" else [N])
    assert not loss.any()
    for x, gradient in zip(arguments, gradients, strict=False):
        assert gradient.shape == x.shape
        assert not gradient.any()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_each_input_may_be_frozen(reduction, frozen):
    arguments = inputs()
    arguments[["hidden", "weight", "bias"].index(frozen)].requires_grad_(False)
    got = results(linear_cross_entropy, *arguments, reduction=reduction)
    want = results(linear_cross_entropy_reference, *arguments, reduction=reduction)
    for ours, reference in zip(got, want, strict=True):
        torch.testing.assert_close(ours, reference)


def test_backward_twice_through_a_retained_graph_gives_the_gradient_twice():
    hidden, weight, _, targets = inputs(bias=False)
    loss = linear_cross_entropy(hidden, weight, targets) * 3
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_hidden_and_weight_may_have_any_strides(reduction):
    hidden, weight, bias, targets = inputs()
    want = results(linear_cross_entropy, hidden, weight, bias, targets, reduction=reduction)
    strided = [x.detach().t().contiguous().t().requires_grad_() for x in (hidden, weight)]
    got = results(linear_cross_entropy, *strided, bias, targets, reduction=reduction)
    for ours, reference in zip(got, want, strict=True):
        torch.testing.assert_close(ours, reference)


class Largest(TorchDispatchMode):
    """The most values of any tensor that is made, and how many matrix products make them."""

    def __init__(self):
        super().__init__()
        self.numel = self.products = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        self.products += operator.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_tensor_holds_the_logits_of_more_than_a_chunk(monkeypatch, reduction, dtype):
    N, V, d = 64, 512, 32
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * V * 8)
    monkeypatch.setattr(module, "MIN_ROWS", 1)
    arguments = inputs(N, V, d, dtype, bias=False)
    with Largest() as largest:
        results(linear_cross_entropy, *arguments, reduction=reduction)
    assert largest.numel == V * d  # the gradient of weight; a chunk of 8 rows of logits is smaller, N V is 2 times it


@pytest.mark.parametrize("grad", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_without_gradients_only_the_logits_are_computed(small_chunks, grad):
    hidden, weight, _, targets = inputs(9, bias=False, ignored=())
    with grad(), Largest() as largest:
        loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.requires_grad == (grad is contextlib.nullcontext)
    assert largest.products == (9 if loss.requires_grad else 3)  # three chunks


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("reduction must be 'sum' or 'none'; got 'mean'", {"reduction": "mean"}),
        (r"hidden must be \[N, d\], d at least 1; got \[1, 4, 8\]", {"hidden": torch.ones(1, 4, 8)}),
        (r"weight must be \[V, 8\] .* got \[10, 7\]", {"weight": torch.ones(10, 7)}),
        (r"weight must be \[V, 8\] .* got \[0\]", {"weight": torch.ones(0)}),
        (r"bias must be \[10\] .* got \[1\]", {"bias": torch.ones(1)}),
        (r"targets must be int64 \[4\]; got torch.int32 \[4\]", {"targets": torch.ones(4, dtype=torch.int32)}),
        (r"targets must be int64 \[4\]; got torch.int64 \[5\]", {"targets": torch.ones(5, dtype=torch.int64)}),
        ("weight has dtype torch.bfloat16; hidden .torch.float32.", {"weight": torch.ones(10, 8).bfloat16()}),
        ("hidden has dtype torch.int64", {"hidden": torch.ones(4, 8, dtype=torch.int64)}),
        (r"in \[0, 10\), the rows of weight, .* -100; row 2 has 10", {"targets": torch.tensor([0, -100, 10, 11])}),
        (r"in \[0, 10\), the rows of weight, .* -100; row 3 has -1", {"targets": torch.tensor([0, -100, 9, -1])}),
        *(
            ("ignore_index must be an integer .*; got", {"ignore_index": i})
            for i in (None, True, -100.0, 2**63, torch.tensor(-100))
        ),
        ("reduction must be 'sum' or 'none'", {"reduction": torch.ones(2)}),
        ("hidden must be a tensor; got a list", {"hidden": [[1.0] * 8] * 4}),
        ("bias must be a tensor; got a float", {"bias": 0.0}),
        ("weight is on meta, hidden on cpu", {"weight": torch.ones(10, 8, device="meta")}),
    ],
)
def test_what_does_not_go_together_is_refused(message, arguments):
    defaults = {"hidden": torch.ones(4, 8), "weight": torch.ones(10, 8), "targets": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**defaults | arguments)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("low", [["hidden"], ["weight"], ["bias"], ["hidden", "bias"], ["hidden", "weight", "bias"]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_inputs_of_several_dtypes(device, dtype, low, reduction):
    """As torch's own linear does; what is in autocast's dtype already, a hidden state say, is left as it is."""
    names = ("hidden", "weight", "bias")
    *parameters, targets = inputs(dtype=torch.float32, device=device)
    mixed = [
        x.detach().to(dtype if name in low else torch.float32).requires_grad_()
        for name, x in zip(names, parameters, strict=True)
    ]
    rounded = [x.detach().to(dtype).float().requires_grad_() for x in mixed]
    with torch.autocast(device.type, dtype=dtype):
        got = results(linear_cross_entropy, *mixed, targets, reduction=reduction)
    want = results(linear_cross_entropy_reference, *rounded, targets, reduction=reduction)
    assert [x.dtype for x in got[1:]] == [x.dtype for x in mixed]
    for ours, reference in zip(got, want, strict=True):
        tolerance = 4 * torch.finfo(dtype).eps * reference.abs().max()
        torch.testing.assert_close(ours.float(), reference, rtol=0, atol=float(tolerance))
    with pytest.raises(ValueError, match="must share one of") if len(low) < 3 else contextlib.nullcontext():
        linear_cross_entropy(*mixed[:2], targets, bias=mixed[2])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_comes_back_to_ignored_rows_does_not_matter(small_chunks, device, value):
    hidden, weight, bias, targets = inputs(device=device)
    losses = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction="none")
    upstream = torch.ones_like(losses).masked_fill(targets == -100, value)
    got = torch.autograd.grad(losses, (hidden, weight, bias), upstream)
    total = linear_cross_entropy_reference(hidden, weight, targets, bias=bias)
    for ours, reference in zip(got, torch.autograd.grad(total, (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(ours, reference)


_ONE_GRAPH = """
import importlib, torch
module = importlib.import_module("trunkline.kernels.linear_cross_entropy")
module._is_read_at_once = lambda x: False
compiled = torch.compile(module.linear_cross_entropy, fullgraph=True, backend="aot_eager")
h, w, b = leaves = [torch.randn(shape, requires_grad=True) for shape in ((3, 4), (6, 4), (6,))]
for reduction in ("sum", "none"):
    want, got = (
        torch.autograd.grad(call(h, w, torch.tensor([1, -100, 2]), bias=b, reduction=reduction).sum(), leaves)
        for call in (module.linear_cross_entropy, compiled)
    )
    torch.testing.assert_close(got, want)
"""


@pytest.mark.slow
def test_compiled_it_is_one_graph_where_values_are_not_looked_at():
    """As on a GPU. In a process of its own: torch.compile cannot trace allocations that these tests fill with NaN."""
    run = subprocess.run([sys.executable, "-c", _ONE_GRAPH], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
