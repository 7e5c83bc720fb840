from __future__ import annotations

import math

import pytest
import torch

from trunkline.models.token_image.network import PRESETS, Block, JiT, JiTShape, time_features

SMALL = JiTShape((4, 4), 64, 2, 2)


@pytest.mark.parametrize(
    ("preset", "count"),
    [("B/4", 127_681_584), ("B/16", 129_322_752), ("L/16", 455_705_344), ("H/16", 947_251_968)],
)
def test_presets_have_the_parameters_that_they_are_known_by(preset: str, count: int) -> None:
    with torch.device("meta"):
        model = JiT(PRESETS[preset], 64, 3)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def images(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    valid = torch.zeros(batch, 64, 64, dtype=torch.bool)
    valid[0, :2], valid[1, :40] = True, True
    return torch.randn(batch, 64, 64, 3), torch.tensor([10.0, 900.0]), valid


def test_pixels_come_back_where_they_were() -> None:
    model, (x, _, _) = JiT(SMALL, 64, 3), images()
    assert torch.equal(model._join(model._split(x)), x)
    assert torch.equal(model._split(x)[0, 1].view(4, 4, 3), x[0, :4, 4:8])


def test_patches_without_a_valid_pixel_change_nothing_and_those_with_one_do() -> None:
    model, (x, t, valid) = JiT(SMALL, 64, 3), images()
    before = model(x, t, valid)
    far, near = x.clone(), x.clone()
    far[:, 44:] += 1
    near[0, 3] += 1  # padding that lies in a patch with tokens
    assert torch.equal(model(far, t, valid)[:, :40], before[:, :40])
    assert not torch.allclose(model(near, t, valid)[0, :2], before[0, :2])


def test_the_time_acts_only_as_far_as_it_is_learned() -> None:
    model, (x, t, valid) = JiT(SMALL, 64, 3), images()
    assert torch.equal(model(x, t, valid), model(x, t + 50, valid))
    model(x, t, valid).square().sum().backward()
    gradient = model.blocks[0].norm.modulation.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0  # the clamp lets it through
    torch.nn.init.normal_(model.blocks[0].norm.modulation.weight, std=0.1)
    assert not torch.allclose(model(x, t, valid), model(x, t + 50, valid))


def test_a_condition_is_seen_as_far_as_it_is_valid() -> None:
    model, (x, t, valid) = JiT(SMALL, 64, 3), images()
    given, shown = torch.randn(2, 64, 64, 3), torch.zeros(2, 64, 64, dtype=torch.bool)
    without = model(x, t, valid)
    assert torch.equal(model(x, t, valid, given, shown), without)
    shown[1, :4] = True
    found = model(x, t, valid, given, shown)
    assert torch.equal(found[0], without[0])
    assert not torch.allclose(found[1], without[1])


def test_time_features_are_sines_and_cosines_of_falling_frequencies() -> None:
    found = time_features(torch.tensor([3.0]), 8)[0].double()
    angles = [3.0 * 10000 ** (-i / 3) for i in range(4)]
    wanted = torch.tensor([*map(torch.sin, torch.tensor(angles)), *map(torch.cos, torch.tensor(angles))]).double()
    assert torch.allclose(found, wanted, atol=1e-6)


def test_pixels_are_fp32_in_low_precision() -> None:
    model, (x, t, valid) = JiT(SMALL, 64, 3).to(torch.bfloat16), images()
    found = model(x, t, valid)
    assert found.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())
    found.sum().backward()
    assert model.output.weight.grad is not None


@pytest.mark.parametrize("block", ["shared_norm", "official"])
def test_it_starts_as_it_is_meant_to(block: Block) -> None:
    """The original's modulation was to start at zero, and was then drawn at random with all the rest."""
    torch.manual_seed(0)
    for name, value in JiT(SMALL, 64, 3, block=block).state_dict().items():
        zero = ("modulation", "bias", "output") if block == "official" else ("modulation", "bias")
        if any(part in name for part in zero):
            assert not value.any(), name
        elif value.ndim == 1:
            assert torch.equal(value, torch.ones_like(value)), name
        elif block == "official" and "weight" in name:  # by Xavier
            assert float(value.std()) == pytest.approx(math.sqrt(2 / sum(value.shape)), rel=0.1), name
        else:
            assert float(value.std()) == pytest.approx(0.02, rel=0.1), name
