from __future__ import annotations

import pytest
import torch

from trunkline.models.token_image.noise import LAST, Schedule, alpha_of, drawn_times, evenly, noised, time_of

SCHEDULES: list[Schedule] = ["linear", "cosine"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_image_fades_from_whole_to_nothing(schedule: Schedule) -> None:
    alpha = alpha_of(torch.arange(LAST + 1), schedule)
    assert float(alpha[0]) == 1
    assert float(alpha[-1]) == pytest.approx(0, abs=1e-6)
    assert (alpha.diff() < 1e-7).all()
    assert torch.allclose(time_of(alpha, schedule), torch.arange(LAST + 1.0), atol=0.2)


def test_times_are_uniform_and_named_by_their_keys() -> None:
    times = drawn_times(torch.arange(100_000), "linear")
    assert (int(times.min()), int(times.max())) == (0, LAST - 1)
    assert float(times.double().mean()) == pytest.approx(499.5, abs=3)
    assert torch.equal(drawn_times(torch.tensor([77]), "linear"), times[77:78])


def test_noise_has_unit_variance_and_is_independent_of_the_time() -> None:
    draw, alpha = torch.arange(1000), torch.full((1000,), 0.25)
    x = torch.full((1000, 8, 8, 3), 2.0)
    found = (noised(x, alpha, draw) - 0.5) / 0.75
    assert float(found.mean()) == pytest.approx(0, abs=0.01)
    assert float(found.std()) == pytest.approx(1, abs=0.01)
    means = found.mean((1, 2, 3))
    assert abs(float(torch.corrcoef(torch.stack([means, drawn_times(draw, "linear").float()]))[0, 1])) < 0.1


def test_times_by_information_weigh_as_even_ones() -> None:
    t = drawn_times(torch.arange(200_000), "information")
    assert float(t.min()) >= 0
    assert float(t.max()) <= LAST
    share, weight = 1 - t / LAST, evenly(t)
    for power in (0, 1, 2):  # the mean of u^n over even times is 1 / (n + 1)
        assert float((weight * share**power).mean()) == pytest.approx(1 / (power + 1), rel=0.01)
    assert float(share.mean()) == pytest.approx(11 / 18, abs=0.01), "later ones are drawn more often"
