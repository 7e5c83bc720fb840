from __future__ import annotations

import itertools

import torch

from trunkline.models.token_image.bigram import Bigram


def random_rows(*shape: int, seed: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def test_the_posterior_is_that_of_all_texts_weighed_one_by_one() -> None:
    kinds, places = 3, 5
    bigram = Bigram(random_rows(kinds, seed=0), random_rows(kinds, kinds, seed=1))
    likelihood = 4 * torch.randn(2, places, kinds, generator=torch.Generator().manual_seed(2))
    length = torch.tensor([5, 3])
    found = bigram.posterior(likelihood, length)
    for row, count in enumerate(length.tolist()):
        wanted = torch.zeros(count, kinds, dtype=torch.float64)
        for text in itertools.product(range(kinds), repeat=count):
            weight = float(bigram.frequencies[text[0]])
            for before, after in itertools.pairwise(text):
                weight *= float(bigram.transitions[before, after])
            for place, token in enumerate(text):
                weight *= float(likelihood[row, place, token].exp())
            for place, token in enumerate(text):
                wanted[place, token] += weight
        wanted /= wanted.sum(-1, keepdim=True)
        assert torch.allclose(found[row, :count].double(), wanted, atol=1e-5)


def test_certain_pixels_and_impossible_pairs_leave_no_nan() -> None:
    bigram = Bigram(torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    sure = torch.tensor([[0.0, -1e30]]).expand(1, 600, 2)  # says 0 everywhere, which the language does not allow
    found = bigram.posterior(sure, torch.tensor([600]))
    assert torch.isfinite(found).all()
    assert torch.allclose(found.sum(-1), torch.ones(1, 600))
