import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline.engine.data.order import FILLER, GlobalBatches, permuted


@given(size=st.integers(1, 3000), key=st.integers(-(2**63), 2**63 - 1))
@settings(max_examples=60, deadline=None)
def test_the_order_visits_every_sample_exactly_once(size: int, key: int) -> None:
    assert sorted(permuted(np.arange(size), size, key)) == list(range(size))


def test_a_position_does_not_depend_on_which_others_are_asked_for() -> None:
    whole = permuted(np.arange(1000), 1000, 5)
    assert (permuted(np.array([17, 999, 3]), 1000, 5) == whole[[17, 999, 3]]).all()


def test_orders_of_different_epochs_and_seeds_are_unrelated() -> None:
    orders = [permuted(np.arange(500), 500, key) for key in range(40)]
    matches = [(a == b).mean() for i, a in enumerate(orders) for b in orders[:i]]
    assert np.mean(matches) == pytest.approx(1 / 500, rel=0.15)


def test_every_sample_reaches_every_place_about_equally_often() -> None:
    size, keys = 12, 6000
    counts = np.zeros((size, size))
    for key in range(keys):
        counts[np.arange(size), permuted(np.arange(size), size, key)] += 1
    # chi-squared with 11 * 11 degrees of freedom: mean 121, deviation 15.6
    assert ((counts - keys / size) ** 2 / (keys / size)).sum() < 121 + 5 * 15.6


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (8, 4), (3, 8), (20_000, 300), (1, 1)])
def test_an_epoch_holds_every_sample_once_and_fills_its_last_batch(size: int, batch: int) -> None:
    batches = GlobalBatches(size, batch, seed=1)
    for epoch in range(2):
        steps = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
        seen = np.concatenate([batches.samples(step) for step in steps])
        assert sorted(seen[seen != FILLER]) == list(range(size))
        assert (seen != FILLER).sum() == size
        assert {batches.epoch(step) for step in steps} == {epoch}
    assert size < 3 or not np.array_equal(batches.samples(0), batches.samples(batches.per_epoch))
