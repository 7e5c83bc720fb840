from __future__ import annotations

import torch
from torch import Tensor

from tests.models.token_image.toy_run import SMALL
from trunkline.models.token_image.config import TokenImageModel
from trunkline.models.token_image.denoiser import Denoiser
from trunkline.models.token_image.encodings import Encoding
from trunkline.models.token_image.generation import alphas_of, frames, read_once


def watched(network: Denoiser) -> list[Tensor | None]:
    """What the network is given of its own guesses, call by call."""
    seen: list[Tensor | None] = []
    network.register_forward_pre_hook(lambda _, __, named: seen.append(named.get("previous")), with_kwargs=True)
    return seen


def test_a_self_conditioned_network_sees_its_guess_of_the_call_before() -> None:
    torch.manual_seed(0)
    network = Denoiser(TokenImageModel(**SMALL, self_conditioning=True), 8, Encoding("bits", 256)).eval()
    seen = watched(network)
    way = list(frames(network, 8, torch.tensor([64, 20]), steps=3, method="euler"))
    assert seen[0] is not None
    assert not seen[0].any()  # there is none before the first
    for given, (_, guess) in zip(seen[1:], way[:-1], strict=True):
        assert given is not None
        assert torch.equal(given, guess)


def test_one_reading_of_a_self_conditioned_network_sees_its_own_first_guess() -> None:
    torch.manual_seed(0)
    network = Denoiser(TokenImageModel(**SMALL, self_conditioning=True), 8, Encoding("bits", 256)).eval()
    seen = watched(network)
    x, held = torch.randn(2, 8, 8, 8), torch.ones(2, 8, 8, dtype=torch.bool)
    read_once(network, x, torch.tensor([500.0, 500.0]), held, ())
    assert seen[0] is None
    assert torch.equal(seen[1], network(x, torch.tensor([500.0, 500.0]), held))  # type: ignore[arg-type]


def test_alphas_of_other_schedules_begin_at_noise_and_end_clean() -> None:
    for noise, wanted in (("linear", [0, 0.25, 0.5, 0.75, 1]), ("cosine", [0, 0.146447, 0.5, 0.853553, 1])):
        network = Denoiser(TokenImageModel(**SMALL, noise=noise), 8, Encoding("rgb", 256))
        assert torch.allclose(alphas_of(network, 4), torch.tensor(wanted, dtype=torch.float32), atol=1e-6)
