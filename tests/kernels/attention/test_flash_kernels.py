"""The Triton kernels of flash_attention: on the CPU interpreted, in small tiles, and with `-m gpu` as shipped."""

import contextlib
import mmap
import random

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from trunkline.kernels.attention import backward as flash_attention_backward
from trunkline.kernels.attention import flash_attention
from trunkline.kernels.attention import forward as flash_attention_forward
from trunkline.kernels.attention.backward import launch_backward
from trunkline.kernels.attention.forward import heads_in_l2, launch_forward
from trunkline.kernels.attention.key_tiles import sort_key_tiles
from trunkline.kernels.attention.tiles import TILES, Tile
from trunkline.kernels.reference import attention_reference, visible_pairs

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
pytestmark = pytest.mark.usefixtures("bf16_rounds_to_nearest")


@pytest.fixture(autouse=True)
def small_tiles(device, monkeypatch):
    """Tiles of 16 in the interpreter, so that short sequences have inner tiles, boundaries and remainders."""
    if device.type == "cpu":
        work_in_tiles(monkeypatch, 16, 16)


def work_in_tiles(monkeypatch, queries, keys):
    for module in (flash_attention_forward, flash_attention_backward):
        monkeypatch.setattr(module, "choose_tile", lambda *_: Tile(queries, keys, 4, 2))


@contextlib.contextmanager
def deterministic(mode=True):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def inputs(device, B=2, N=37, M=37, Hq=2, Hkv=1, D=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, N, Hq, D), (B, M, Hkv, D), (B, M, Hkv, D))
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def some_keys(B, M, device="cpu", seed=1):
    """A mask with wholly padded tiles, partly padded ones and whole ones; the last sample has no real key."""
    mask = torch.rand(B, M, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask[0, : M // 3] = False
    mask[0, M // 3 : 2 * M // 3] = True
    mask[-1] = False
    return mask.to(device)


def upstream_of(out):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.device, out.dtype)


def gradients(out, leaves, retain_graph=False):
    return torch.autograd.grad(out, leaves, upstream_of(out), retain_graph=retain_graph)


def dense_in_the_same_dtype(q, k, v, causal_block=None, key_mask=None, softmax_scale=None):
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    seen = visible_pairs(q.shape[1], k.shape[1], causal_block, key_mask, q.device)
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    scores = (torch.einsum("bihd,bjhd->bhij", q, k) * scale).masked_fill(~seen, torch.finfo(q.dtype).min)
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1).masked_fill(~seen, 0), v)


def assert_as_accurate_as_dense_torch(leaves, **arguments):
    """The error of the output and of every gradient is at most twice that of dense torch in the same dtype."""
    out = flash_attention(*leaves, **arguments)
    plain = dense_in_the_same_dtype(*leaves, **arguments)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    truth = attention_reference(*wide, **arguments)
    plain_and_true_gradients = list(zip(gradients(plain, leaves), gradients(truth, wide), strict=True))
    cases = [(out, plain, truth, torch.zeros(()))]
    inherited = gradients_of_a_rounded_output(wide, (out - truth).detach(), **arguments)
    for mode in (False, True):
        with deterministic(mode):
            ours = gradients(out, leaves, retain_graph=True)
        cases += [(x, *rest, by) for x, rest, by in zip(ours, plain_and_true_gradients, inherited, strict=True)]
    for ours, plain, truth, inherited_error in cases:
        assert ours.dtype == leaves[0].dtype
        error, allowed = ((x.detach() - truth).abs().max() for x in (ours, plain))
        # and a rounding of the largest value, for where dense torch happens to be exact
        rounding = torch.finfo(leaves[0].dtype).eps * truth.abs().max()
        assert error <= 2 * allowed + inherited_error.abs().max() + rounding + 1e-5 * (1 + truth.abs().max())


def gradients_of_a_rounded_output(leaves, error, causal_block=None, key_mask=None, softmax_scale=None):
    """By how much an error of the output shifts the gradients of every flash attention.

    Its backward pass reads delta = rowsum(dO * O) off the rounded output. Off by e_i, it takes p_ij e_i from each
    gradient of a score, and p_ij is that of row i's log-sum-exp.
    """
    q, k, v = leaves
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    seen = visible_pairs(q.shape[1], k.shape[1], causal_block, key_mask, q.device)
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)) * scale
    lse = scores.masked_fill(~seen, -1e30).logsumexp(-1)
    shift = (upstream_of(error) * error).sum(-1).transpose(1, 2)
    return *torch.autograd.grad((shift * lse).sum(), (q, k)), torch.zeros_like(v)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("N", "M", "causal_block"),
    [
        *((37, 37, causal_block) for causal_block in (None, 1, 7, 21)),
        *((N, M, causal_block) for N, M in ((20, 45), (40, 20)) for causal_block in (None, 7)),
        *(
            pytest.param(N, M, causal_block, marks=pytest.mark.slow)
            for N, M in ((20, 45), (40, 20))
            for causal_block in (1, 21)
        ),
    ],
)
def test_every_pattern(device, causal_block, masked, N, M):
    dtype = DTYPES[(N + (causal_block or 0)) % 3]
    mask = some_keys(2, M, device) if masked else None
    leaves = inputs(device, N=N, M=M, Hq=2, Hkv=1, dtype=dtype)
    assert_as_accurate_as_dense_torch(leaves, causal_block=causal_block, key_mask=mask)


@pytest.mark.parametrize(
    ("D", "dtype"),
    [
        pytest.param(D, dtype, marks=[pytest.mark.slow] * ((i + j) % 3 != 0))
        for i, D in enumerate([16, 24, 32, 64, 80, 128, 256])
        for j, dtype in enumerate(DTYPES)
    ],
    ids=str,
)
def test_every_head_dimension(device, dtype, D):
    leaves = inputs(device, B=1, N=20, M=35, D=D, dtype=dtype)
    assert_as_accurate_as_dense_torch(leaves, causal_block=10)


@pytest.mark.parametrize(
    ("D", "Hkv", "N", "causal_block"), [(16, 2, 37, 7), (16, 1, 37, None), (24, 1, 37, 1), (64, 2, 20, 10)]
)
def test_dq_added_in_tiles(device, D, Hkv, N, causal_block, monkeypatch):
    """As on Hopper, where `-m gpu` runs it in earnest. The last tile of a head must not reach into the next one."""
    if device.type == "cpu":
        add_tiles_in_the_interpreter(monkeypatch)
    leaves = inputs(device, N=N, Hkv=Hkv, D=D, dtype=torch.bfloat16)
    mask = some_keys(2, 37, device)
    assert_as_accurate_as_dense_torch(leaves, causal_block=causal_block, key_mask=mask)
    assert_as_accurate_as_dense_torch(leaves, causal_block=causal_block)


def add_tiles_in_the_interpreter(monkeypatch):
    """Triton's interpreter, up to 3.9, knows loads and stores of tensor descriptors, not additions."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    ir = interpreter._ir

    def create_descriptor_reduce(self, kind, descriptor, value, indices):
        assert kind == ir.DESCRIPTOR_REDUCE_KIND.ADD
        pointers, mask = descriptor.materialize_pointers(indices)
        order = ir.MEM_SEMANTIC.RELAXED, ir.MEM_SYNC_SCOPE.GPU
        return self.create_atomic_rmw(ir.ATOMIC_OP.FADD, pointers, value, mask, *order)

    builder = interpreter.InterpreterBuilder
    monkeypatch.setattr(builder, "create_descriptor_reduce", create_descriptor_reduce, raising=False)
    monkeypatch.setattr(flash_attention_backward, "adds_tiles", lambda q: True)


def draw_configuration(draw, device):
    """Leaves and arguments of one random call."""
    B, D = draw.randint(1, 2), draw.choice([16, 16, 19, 32, 40])
    Hkv, group = draw.choice([(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)])
    N, M = draw.randint(1, 40), draw.randint(1, 40)
    leaves = inputs(device, B, N, M, Hkv * group, Hkv, D, draw.choice(DTYPES), seed=draw.randrange(2**31))
    layout = draw.choice(["plain", "heads first", "batch last"])
    if layout == "heads first":
        leaves = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in leaves]
    elif layout == "batch last":
        leaves = [x.detach().permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2).requires_grad_() for x in leaves]
    mask = torch.rand(B, M, generator=torch.Generator().manual_seed(draw.randrange(2**31))) > draw.choice(
        [0.2, 0.9, 1.0]
    )
    if draw.random() < 0.5:  # padding at the end
        mask = torch.arange(M) < torch.tensor([[draw.randint(0, M)] for _ in range(B)])
    arguments = {
        "causal_block": draw.choice([None, 1, draw.randint(2, 45)]),
        "key_mask": mask.to(device) if draw.random() < 0.6 else None,
        "softmax_scale": draw.choice([None, draw.uniform(0.05, 1.0)]),
    }
    return leaves, arguments


@pytest.mark.usefixtures("overflows_are_found")
@pytest.mark.parametrize(
    "seed", [233299, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (496117, 720481, 905533, *[None] * 4))]
)
def test_random_configurations(device, seed, monkeypatch):
    """10 of each seed here, 200 of fresh seeds in all with -m slow."""
    count = 50 if seed is None else 10
    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    print(f"random configurations of seed {seed}")
    draw = random.Random(seed)
    for i in range(count):
        leaves, arguments = draw_configuration(draw, device)
        tile = draw.choice([(16, 16), (16, 32), (32, 16)])
        if device.type == "cpu":
            work_in_tiles(monkeypatch, *tile)
        try:
            assert_as_accurate_as_dense_torch(leaves, **arguments)
        except AssertionError as error:
            what = f"{[list(x.shape) for x in leaves]} {leaves[0].dtype} {arguments}, tile {tile}"
            raise AssertionError(f"configuration {i} of seed {seed}: {what}") from error


@pytest.mark.parametrize("architecture", [90, pytest.param(80, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("D", "Hq", "dtype"),
    [(16, 2, "half"), (32, 1, "half"), (64, 1, "bfloat16"), (64, 2, "float"), (128, 2, "bfloat16"), (256, 1, "half")],
)
def test_shipped_tiles(device, D, Hq, dtype, architecture, monkeypatch):
    """Three blocks of 107 variables, whose borders cut the tiles, the last variables of each padding."""
    chosen = lambda name, q, block_d: TILES[architecture, 8 * q.element_size(), name][block_d]  # noqa: E731
    for module in (flash_attention_forward, flash_attention_backward):
        monkeypatch.setattr(module, "choose_tile", chosen)
    leaves = inputs(device, B=1, N=3 * 107, M=3 * 107, Hq=Hq, Hkv=1, D=D, dtype=getattr(torch, dtype))
    mask = (torch.arange(3 * 107, device=device) % 107 < 101)[None]
    assert_as_accurate_as_dense_torch(leaves, causal_block=107, key_mask=mask)


@pytest.mark.parametrize("causal_block", [None, 1, 8])
def test_rows_without_a_visible_key_give_zero_and_pass_no_gradient(device, causal_block):
    leaves = inputs(device)
    mask = torch.ones(2, 37, dtype=torch.bool, device=device)
    mask[0, :24] = False
    mask[1] = False
    dead = torch.zeros_like(mask)
    dead[1] = True
    dead[0, :24] = causal_block is not None
    out = flash_attention(*leaves, causal_block=causal_block, key_mask=mask)
    assert (out[dead] == 0).all()
    assert (out[~dead].abs().sum(dim=(-1, -2)) > 0).all()
    for mode in (False, True):
        with deterministic(mode):
            assert all((g == 0).all() for g in torch.autograd.grad(out[dead].sum(), leaves, retain_graph=True))


@pytest.mark.parametrize("causal_block", [None, 1, 8])
def test_what_stands_in_padding_never_matters(device, causal_block):
    clean, mask = inputs(device), some_keys(2, 37, device)
    dead = ~visible_pairs(37, 37, causal_block, mask, device)[:, 0].any(-1)
    assert dead[0].any() == (causal_block is not None)
    results = []
    for garbage in (0.0, float("nan"), float("inf")):
        leaves = [x.detach().clone() for x in clean]
        if garbage:
            leaves[0][dead] = leaves[1][~mask] = leaves[2][~mask] = garbage
        leaves = [x.requires_grad_() for x in leaves]
        out = flash_attention(*leaves, causal_block=causal_block, key_mask=mask)
        upstream = torch.ones_like(out)
        upstream[dead] = garbage
        results.append([out])
        for mode in (False, True):
            with deterministic(mode):
                results[-1] += torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    for spoiled in results[1:]:
        for got, want in zip(spoiled, results[0], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0 if device.type == "cpu" else 1e-6)


def test_a_row_spoils_no_tile_of_keys_that_it_sees_none_of(device):
    """Blocks begin inside a tile of queries: its first rows see none of the keys of the block."""
    tile = 16 if device.type == "cpu" else 64
    N, block, row, past = (tile * x // 8 for x in (36, 12, 10, 16))
    leaves = inputs(device, B=1, N=N, M=N)
    out = flash_attention(*leaves, causal_block=block)
    clean = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(out)
    spoiled = clean.clone()
    spoiled[:, row] = float("nan")
    for mode in (False, True):
        with deterministic(mode):
            (_, *got), (_, *want) = (
                torch.autograd.grad(out, leaves, upstream, retain_graph=True) for upstream in (spoiled, clean)
            )
        for ours, expected in zip(got, want, strict=True):  # of keys and values
            assert ours[:, :block].isnan().all()
            torch.testing.assert_close(ours[:, past:], expected[:, past:], rtol=0, atol=0 if tile == 16 else 1e-6)


@pytest.mark.parametrize("shape", [{"N": 0}, {"M": 0}, {"B": 0}, {"N": 0, "M": 0}])
def test_no_rows(device, shape):
    leaves = inputs(device, **shape)
    out = flash_attention(*leaves, causal_block=4)
    assert out.shape == leaves[0].shape
    assert (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), leaves))


def test_inputs_need_not_be_contiguous(device):
    packed = torch.randn(2, 37, 2, 3, 16, generator=torch.Generator().manual_seed(0)).to(device)
    views = [packed[:, :, :, i] for i in range(3)]
    turned = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in views]
    far_apart = [torch.zeros(2, 37, 2, 40, device=device)[..., :16].copy_(x) for x in views]
    want = flash_attention(*(x.contiguous() for x in views), causal_block=4)
    for leaves in (views, turned, far_apart):
        assert not leaves[0].is_contiguous()
        torch.testing.assert_close(flash_attention(*leaves, causal_block=4), want, rtol=0, atol=0)


@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("N", [128, pytest.param(512, marks=pytest.mark.slow)])
def test_both_passes_take_the_memory_that_the_docstring_counts(device, N, mode):
    """So it grows with N, not with N x N. On top comes what says where the padding is."""
    B, H, D, M = 1, 2, 16, N
    q, k, v = (x.detach() for x in inputs(device, B=B, N=N, M=M, Hq=H, Hkv=H, D=D, dtype=torch.bfloat16))
    d_out, mask = torch.ones_like(q), torch.arange(M, device=device)[None] % 50 < 45
    tracker = MemTracker()
    tracker.track_external(q, k, v, d_out)
    with tracker:
        out, lse = launch_forward(q, k, v, mask, 64, 0.25)
        launch_backward(d_out, q, k, v, out, lse, mask, 64, 0.25, deterministic=mode)
    (peak,) = (sizes["Total"] for sizes in tracker.get_tracker_snapshot("peak").values())
    values = B * N * H * D
    counted = 2 * (4 * values + 4 * values) + 12 * B * N * H + (0 if mode else 4 * values)
    assert counted <= peak <= 1.05 * counted


@pytest.mark.slow
@pytest.mark.usefixtures("overflows_are_found")
def test_offsets_beyond_two_to_the_31_elements(device):
    if device.type == "cuda":
        memory = torch.zeros(2**31 + 2**20, dtype=torch.float16, device=device)
    else:  # pages that nobody touches cost nothing
        memory = torch.frombuffer(mmap.mmap(-1, 2**32 + 2**21), dtype=torch.float16)
    near = [x.detach() for x in inputs(device, B=2, N=20, M=20, Hq=2, Hkv=2, dtype=torch.float16)]
    near.append(torch.randn(near[0].shape, generator=torch.Generator().manual_seed(3)).to(near[0]))
    for mode, atol in ((False, 0 if device.type == "cpu" else 1e-2), (True, 0)):
        with deterministic(mode):
            want = out_and_gradients(*near)
            for strides in ((2**31, 64, 16, 1), (16, 64, 2**31, 1), (16, 2**26, 2**25, 1)):
                for i in range(4):
                    far = list(near)
                    far[i] = torch.as_strided(memory, near[i].shape, strides).copy_(near[i])
                    for got, expected in zip(out_and_gradients(*far), want, strict=True):
                        torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.usefixtures("overflows_are_found")
def test_a_batch_larger_than_a_grid_s_second_dimension(device, monkeypatch):
    """On a CPU the last programs of each kernel run, for the last samples. With one key, its weight is 1."""
    if device.type == "cpu":
        interpreter = pytest.importorskip("triton.runtime.interpreter")
        monkeypatch.setattr(interpreter, "range", lambda *ends: range(*ends)[-16:], raising=False)
        set_grid_dim = interpreter.InterpreterBuilder.set_grid_dim

        def as_cuda_does(self, x, y, z):
            assert x < 2**31
            assert max(y, z) < 2**16
            set_grid_dim(self, x, y, z)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "set_grid_dim", as_cuda_does)
    q, k, v = (x.detach() for x in inputs(device, B=2**16 + 1, N=1, M=1, Hq=2, Hkv=2))
    upstream, mask = torch.randn_like(v), torch.ones(len(q), 1, dtype=torch.bool, device=device)
    mask[-2] = False
    for mode in (False, True):
        out, lse = launch_forward(q, k, v, mask, None, 0.25)
        dq, _, dv = launch_backward(upstream, q, k, v, out, lse, mask, None, 0.25, deterministic=mode)
        for got, want in ((out, v), (dv, upstream), (dq, torch.zeros_like(q))):
            torch.testing.assert_close(got[-4:], (want * mask[:, :, None, None])[-4:], rtol=1e-5, atol=1e-5)


def test_few_keys_do_not_put_more_heads_to_work_than_there_are():
    """Kernels multiply this by a number of tiles, in 32 bits: it must not exceed what the grid holds."""
    assert heads_in_l2(bytes_per_head=2 * 16 * 2, num_heads=8) == 8
    assert heads_in_l2(bytes_per_head=5_000_000, num_heads=8) == 5
    assert heads_in_l2(bytes_per_head=10**9, num_heads=8) == 1


def out_and_gradients(q, k, v, upstream):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = flash_attention(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def test_key_tiles_are_sorted_into_whole_and_partly_padded_ones(device):
    T, F = [True] * 4, [False] * 4
    P = [True, False, True, False]
    mask = torch.tensor([F + P + T + T + F + P[:2], T + T + P + T + T + T[:2], F * 5 + F[:2]], device=device)
    tiles = sort_key_tiles(mask.view(torch.uint8), 4).tolist()
    assert [*tiles[0][0][:4], *tiles[0][1:]] == [2, 3, 1, 5, [0, 0, 0, 1, 2, 2, 2], [0, 0, 1, 1, 1, 1, 2]]
    assert [*tiles[1][0][:6], *tiles[1][1:]] == [0, 1, 3, 4, 2, 5, [0, 1, 2, 2, 3, 4, 4], [0, 0, 0, 1, 1, 1, 2]]
    assert tiles[2][1:] == [[0] * 7, [0] * 7]


@pytest.mark.parametrize("M", [1, 127 * 16, 128 * 16, 129 * 16, 5000])
def test_key_tiles_of_many_keys(device, M):
    """Of more tiles than are sorted at once."""
    mask = torch.rand(2, M // 50 + 1, generator=torch.Generator().manual_seed(M)) > 0.3
    mask = mask.repeat_interleave(50, dim=1)[:, :M].contiguous()
    tiles = sort_key_tiles(mask.to(device).view(torch.uint8), 16).tolist()
    for (order, whole_before, partial_before), sample in zip(tiles, mask, strict=True):
        real = [part.sum().item() for part in sample.split(16)]
        whole = [t for t, count in enumerate(real) if count == 16]
        partial = [t for t, count in enumerate(real) if 0 < count < 16]
        assert order[: len(whole + partial)] == whole + partial
        assert whole_before == [sum(w < t for w in whole) for t in range(len(real) + 1)]
        assert partial_before == [sum(p < t for p in partial) for t in range(len(real) + 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_reach_the_kernels_at_multiples_of_16_bytes(device, dtype):
    """Which their loads take for granted. What lies so already is not copied."""
    B, N, H, D, bytes_each = 2, 5, 3, 24, torch.finfo(dtype).bits // 8
    flat = torch.randn(B * N * H * 32 + 16).to(device, dtype)
    fitting = flat[: B * N * H * 32].view(B, N, H, 32)
    for x in (
        fitting,
        fitting[..., 8:],
        fitting[..., :D],
        fitting.transpose(1, 2),
        flat[8:][: B * N * H * D].view(B, N, H, D),
    ):
        assert flash_attention_forward.addressable(x).data_ptr() == x.data_ptr()
    for x in (
        flat[1 : 1 + B * N * H * D].view(B, N, H, D),  # contiguous, but not from a multiple of 16 bytes on
        fitting[..., 1 : 1 + D],
        flat[: B * N * H * (D + 1)].view(B, N, H, D + 1)[..., :D],
        flat[: B * N * H * D].view(B, N, D, H).transpose(2, 3),
    ):
        copy = flash_attention_forward.addressable(x)
        assert torch.equal(copy, x)
        assert all(at * bytes_each % 16 == 0 for at in copy.stride()[:-1])
        assert (copy.data_ptr() % 16, copy.stride(-1)) == (0, 1)


@pytest.mark.parametrize("D", [17, 20, 24, 40, 72])
def test_head_dimensions_and_places_that_16_does_not_divide(device, D):
    q, k, v = (torch.cat([x[..., :1], x], dim=-1).detach()[..., 1:] for x in inputs(device, N=20, M=20, D=D))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert leaves[0].stride(2) == D + 1
    assert_as_accurate_as_dense_torch(leaves, causal_block=10, key_mask=some_keys(2, 20, device))
