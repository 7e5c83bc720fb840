"""Which tiles a device uses, and what it is told where there are none for it."""

from __future__ import annotations

import pytest
import torch

from trunkline.kernels.attention.tiles import ARCHITECTURES, TILES, architecture_of

GPU = torch.device("cuda")


@pytest.fixture
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: request.param)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [
        ((8, 0), 80),  # A100
        ((8, 6), 86),  # RTX 3090
        ((8, 7), 80),  # Orin
        ((8, 9), 86),  # RTX 4090
        ((9, 0), 90),  # H100
        ((10, 0), 100),  # B200
        ((10, 3), 100),  # B300
        ((12, 0), 120),  # RTX 5090
        ((13, 0), 120),  # not known: the tiles that need the least
    ],
    indirect=["capability"],
)
def test_a_gpu_uses_the_tiles_of_its_compute_capability(capability: None, architecture: int) -> None:
    assert architecture_of(GPU) == architecture


@pytest.mark.parametrize("capability", [(7, 5), (6, 1)], indirect=True)
def test_a_gpu_before_8_0_is_refused_by_name(capability: None) -> None:
    with pytest.raises(ValueError, match=r"flash_attention needs .* 8\.0 or later; Tesla T4 has [67]\.[15]"):
        architecture_of(GPU)


@pytest.mark.parametrize("capability", [(9, 4)], indirect=True)
def test_an_amd_gpu_gets_small_tiles_and_no_option_of_nvidias(
    capability: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tile = TILES[90, 16, "forward"][64]
    assert tile.options()["maxnreg"] == 168
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert architecture_of(GPU) == 86
    assert tile.options() == {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}


def test_there_is_a_tile_for_every_use() -> None:
    for architecture in ARCHITECTURES.values():
        for bits in (16, 32):
            for name in ("forward", "backward", "backward_dq", "backward_delta"):
                assert list(TILES[architecture, bits, name]) == [16, 32, 64, 128, 256]
