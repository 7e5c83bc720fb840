"""The block of Li and He, written out as their model_jit.py has it, and what it counts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.models.token_image.network import PRESETS, JiT, JiTShape, OfficialBlock, _places

D, HEADS = 64, 2


def block_of(places: Tensor) -> OfficialBlock:
    """In fp64, with weights that are all at random."""
    torch.manual_seed(0)
    block = OfficialBlock(D, HEADS, places).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


def as_theirs(w: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights, or gradients, by their names. Rotary pairs are neighbours there; here they are i and i + D/2."""
    each = D // HEADS
    order = torch.arange(each).view(2, -1).T.flatten()
    rows = (torch.arange(HEADS)[:, None] * each + order).flatten()
    qkv = torch.cat([rows, rows + D, torch.arange(2 * D, 3 * D)])
    return {
        "norm1.weight": w["norm1.weight"], "norm2.weight": w["norm2.weight"],
        "attn.qkv.weight": w["qkv.weight"][qkv], "attn.qkv.bias": w["qkv.bias"][qkv],
        "attn.q_norm.weight": w["q_norm.weight"][order], "attn.k_norm.weight": w["k_norm.weight"][order],
        "attn.proj.weight": w["projection.weight"], "attn.proj.bias": w["projection.bias"],
        "mlp.w12.weight": w["up.weight"], "mlp.w12.bias": w["up.bias"],
        "mlp.w3.weight": w["down.weight"], "mlp.w3.bias": w["down.bias"],
        "adaLN_modulation.1.weight": w["modulation.linear.weight"],
        "adaLN_modulation.1.bias": w["modulation.linear.bias"],
    }  # fmt: skip


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def turned(x: Tensor, places: Tensor) -> Tensor:
    """[B, H, N, D], its neighbours as complex numbers; an equal part of them for each axis."""
    axes, pairs = places.shape[1], x.shape[-1] // 2 // places.shape[1]
    rates = [10000 ** (-2 * i / (2 * pairs)) for i in range(pairs)]
    angles = torch.stack([places[:, axis].double() * rate for axis in range(axes) for rate in rates], -1)
    numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


def theirs(w: dict[str, Tensor], x: Tensor, c: Tensor, places: Tensor, seen: Tensor) -> Tensor:
    batch, tokens, d = x.shape
    modulation = F.silu(c) @ w["adaLN_modulation.1.weight"].T + w["adaLN_modulation.1.bias"]
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, None].split(d, -1)
    h = rms(x, w["norm1.weight"]) * (1 + scale1) + shift1
    q, k, v = (h @ w["attn.qkv.weight"].T + w["attn.qkv.bias"]).view(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    q, k = turned(rms(q, w["attn.q_norm.weight"]), places), turned(rms(k, w["attn.k_norm.weight"]), places)
    scores = (q @ k.mT / math.sqrt(d / HEADS)).masked_fill(~seen[:, None, None], -math.inf)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
    x = x + gate1 * (mixed @ w["attn.proj.weight"].T + w["attn.proj.bias"])
    h = rms(x, w["norm2.weight"]) * (1 + scale2) + shift2
    one, two = (h @ w["mlp.w12.weight"].T + w["mlp.w12.bias"]).chunk(2, -1)
    return x + gate2 * ((F.silu(one) * two) @ w["mlp.w3.weight"].T + w["mlp.w3.bias"])


GRID = torch.tensor([[row, column] for row in range(3) for column in range(4)])


@pytest.mark.parametrize("places", [GRID, torch.arange(12)[:, None]], ids=["grid", "text"])
def test_forward_and_gradient_are_theirs(places: Tensor) -> None:
    block = block_of(places.float())
    weights = {name: value.detach().clone() for name, value in block.named_parameters()}
    plain = {name: value.requires_grad_() for name, value in as_theirs(weights).items()}
    generator = torch.Generator().manual_seed(1)
    x, c = torch.randn(2, 12, D, generator=generator).double(), torch.randn(2, D, generator=generator).double()
    seen = torch.tensor([[True] * 12, [True] * 5 + [False] * 7])
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, wanted = block(mine, c, seen), theirs(plain, other, c, places, seen)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # angles are kept in fp32
    direction = torch.randn(found.shape, generator=generator).double()
    (found * direction).sum().backward()
    (wanted * direction).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-5)
    gradients = as_theirs({name: torch.as_tensor(value.grad) for name, value in block.named_parameters()})
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain[name].grad, rtol=1e-5, atol=1e-5, msg=name)


def test_places_are_those_of_the_grid_or_of_the_text_and_a_condition_lies_before() -> None:
    assert torch.equal(_places((3, 4), False, 0), GRID.float())
    assert torch.equal(_places((12, 1), True, 0)[:, 0], torch.arange(12.0))
    with_slots = _places((3, 4), False, 256)
    assert torch.equal(with_slots[256:], GRID.float())
    assert torch.equal(with_slots[:12], GRID.float() - torch.tensor([16.0, 0.0])), "as far apart as the image's"


@pytest.mark.parametrize(
    ("preset", "patch", "theirs"),
    [("B/16", 16, 131.12e6), ("L/16", 16, 458.88e6), ("H/16", 16, 952.51e6), ("B/4", 4, 130.48e6)],
)
def test_the_counts_are_theirs_but_for_what_stands_around_the_blocks(preset: str, patch: int, theirs: float) -> None:
    """A time MLP, classes, 32 tokens in context, a narrow patch embedding, a modulated norm before the output."""
    with torch.device("meta"):
        model = JiT(PRESETS[preset], 64, 3, block="official")
    d, values, narrow = model.d_model, 3 * patch**2, 256 if preset[0] == "H" else 128
    hidden = int(int(d * 4.0) * 2 / 3)
    head = d // PRESETS[preset].num_heads
    block = 2 * d + 3 * d * (d + 1) + 2 * head + d * (d + 1) + 2 * hidden * (d + 1) + d * (hidden + 1) + 6 * d * (d + 1)
    assert sum(p.numel() for p in model.blocks[0].parameters()) == block
    blocks = sum(p.numel() for p in model.blocks.parameters())
    assert blocks == block * PRESETS[preset].num_layers
    time, classes, context = 256 * d + d + d * d + d, 1001 * d, 32 * d
    patches, output = values * narrow + (narrow + 1) * d, d + 2 * d * (d + 1) + (d + 1) * values
    assert blocks + time + classes + context + patches + output == pytest.approx(theirs, rel=5e-5)


def started(condition: bool = True, patch: tuple[int, int] = (4, 4)) -> JiT:
    """A network whose blocks act, which at the start they do not."""
    torch.manual_seed(0)
    model = JiT(JiTShape(patch, D, 2, HEADS), 16, 3, block="official", condition=condition)
    assert all(not block.modulation.linear.weight.any() for block in model.blocks)
    for block in model.blocks:
        torch.nn.init.normal_(block.modulation.linear.weight, std=0.1)
    torch.nn.init.normal_(model.output.weight, std=0.1)
    return model


def test_what_is_padding_is_not_seen_and_conditions_are_mixed() -> None:
    model, held = started(), torch.zeros(2, 16, 16, dtype=torch.bool)
    held[0, :1], held[1, :9] = True, True
    x, t, given = torch.randn(2, 16, 16, 3), torch.tensor([10, 900]), torch.randn(2, 16, 16, 3)
    without = model(x, t, held)
    noisier = torch.where((torch.arange(16) >= 12)[None, :, None, None], x + 1, x)
    torch.testing.assert_close(model(noisier, t, held)[:, :9], without[:, :9])
    shown = torch.zeros(2, 16, 16, dtype=torch.bool)
    shown[1, :3] = True
    mixed = model(x, t, held, given, shown)
    torch.testing.assert_close(mixed[0], without[0])
    assert (mixed[1] - without[1]).abs().max() > 1e-3
    torch.testing.assert_close(mixed[1:], model(x[1:], t[1:], held[1:], given[1:], shown[1:]))


def test_along_the_text_only_distance_counts() -> None:
    """A text that is moved by whole patches is predicted as before, but for the learned positions."""
    model = started(condition=False, patch=(1, 4))
    model.rows.data.zero_()
    model.columns.data.zero_()
    x, t = torch.randn(1, 16, 16, 3), torch.tensor([300])
    held = (torch.arange(256) < 100).view(1, 16, 16)
    moved_x, moved_held = (v.flatten(1, 2).roll(20, 1).view(v.shape) for v in (x, held))
    found = model(moved_x, t, moved_held).flatten(1, 2)[:, 20:120]
    torch.testing.assert_close(found, model(x, t, held).flatten(1, 2)[:, :100], rtol=1e-4, atol=1e-5)
