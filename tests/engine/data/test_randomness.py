import math

import numpy as np
import torch

from trunkline.engine.data.randomness import mix, mix_last, normal, seed_torch, uniform


def test_draws_depend_on_their_key_alone() -> None:
    keys = torch.tensor([mix(1, 2), mix(3, 4), mix(1, 2)])
    together = normal(keys, (5, 2))
    assert torch.equal(together[0], together[2])
    assert torch.equal(together[1:2], normal(keys[1:2], (5, 2)))
    assert not torch.equal(together[0], together[1])


def test_draws_are_the_same_in_any_batch_and_of_any_size() -> None:
    keys = torch.tensor([mix(5, index) for index in range(60)])
    for count in (1, 2, 33, 301):
        together = normal(keys, (count,), stream=1)
        assert torch.equal(together, torch.cat([normal(key[None], (count,), stream=1) for key in keys]))
    assert normal(keys[:0], (3,)).shape == (0, 3)
    assert normal(keys, (0,)).shape == (60, 0)
    assert normal(keys, ()).shape == (60,)


def test_streams_of_one_key_differ() -> None:
    keys = torch.arange(1000)
    one, two = uniform(keys, (10,), stream=1), uniform(keys, (10,), stream=2)
    assert abs(float(torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1])) < 0.05


def test_uniform_numbers_are_uniform_and_never_zero_or_one() -> None:
    x = uniform(torch.arange(2000), (200,)).double().flatten()
    assert x.min() > 0
    assert x.max() < 1
    empirical = torch.arange(1, len(x) + 1) / len(x)
    assert float((x.sort().values - empirical).abs().max()) * math.sqrt(len(x)) < 2.0  # Kolmogorov-Smirnov


def test_normal_numbers_have_the_moments_of_the_normal_distribution() -> None:
    x = normal(torch.arange(4000) * 7919, (100,)).double().flatten()
    assert abs(x.mean()) < 0.01
    assert abs(x.var() - 1) < 0.02
    assert abs((x**3).mean()) < 0.05
    assert abs((x**4).mean() - 3) < 0.1


def test_normal_numbers_are_normal_up_to_their_tails() -> None:
    x = normal(torch.arange(20_000) * 1_000_003, (151,), stream=2).double().flatten()
    expected, empirical = torch.special.ndtr(x.sort().values), torch.arange(1, len(x) + 1) / len(x)
    assert float((expected - empirical).abs().max()) * math.sqrt(len(x)) < 2.0  # Kolmogorov-Smirnov
    for limit in (2.0, 3.0, 4.0, 4.5):
        for side in (x, -x):
            wanted = float(torch.special.ndtr(torch.tensor(-limit, dtype=torch.float64))) * len(x)
            assert abs(float((side > limit).sum()) - wanted) < 4 * math.sqrt(wanted)


def test_neighbours_in_a_draw_streams_keys_and_kinds_are_independent() -> None:
    keys = torch.arange(3000)
    one, two = normal(keys, (200,)), normal(keys, (200,), stream=1)
    even = uniform(keys, (200,))
    pairs = {
        "places": (one[:, :-1], one[:, 1:]),
        "two of a pair": (one[:, :100], one[:, 100:]),
        "keys": (one[:-1], one[1:]),
        "streams": (one, two),
        "kinds": (one, even - 0.5),
    }
    for name, (a, b) in pairs.items():
        for function in (lambda x: x, torch.square, torch.abs, lambda x: (3 * x).sin()):
            both = torch.stack([function(a.double()).flatten(), function(b.double()).flatten()])
            assert abs(float(torch.corrcoef(both)[0, 1])) * math.sqrt(both.shape[1]) < 4.5, name


def test_mixing_many_keys_is_mixing_each() -> None:
    keys = np.array([0, 1, -1, 2**40, -(2**62)])
    assert mix_last(keys, 3, -4).tolist() == [mix(3, -4, key) for key in keys]
    assert mix_last(keys).tolist() == [mix(key) for key in keys]


def test_seeding_torch_is_torch_s_own_seeding() -> None:
    seed_torch(5, 6)
    ours = torch.randn(4)
    torch.manual_seed(mix(5, 6))
    assert torch.equal(ours, torch.randn(4))


def test_mix_depends_on_every_key_and_their_order() -> None:
    assert len({mix(a, b) for a in range(100) for b in range(100)}) == 10_000
    assert mix(1, 2) != mix(2, 1)
    assert all(-(2**63) <= mix(a) < 2**63 for a in range(100))
