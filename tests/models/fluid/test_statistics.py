from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trunkline.models.fluid import statistics
from trunkline.models.fluid.statistics import (
    STATISTICS,
    case_moments,
    column_statistics,
    merge_moments,
    sample_positions,
)


def streamed(cases: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    moments = merge_moments(case_moments(boundary, state) for boundary, state in cases)
    rows = np.concatenate([np.concatenate(case, axis=1) for case in cases])
    return column_statistics(moments, rows[sample_positions(len(rows), rows.shape[1])])


def at_once(cases: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """The same by numpy on the concatenation of all cases, column by column without its missing values."""
    whole = [np.concatenate(case, axis=1).astype(np.float64) for case in cases]
    levels = np.concatenate(whole)
    changes = np.concatenate([np.diff(case, axis=0) for case in whole])
    out = {name: np.zeros(levels.shape[1]) for name in STATISTICS}
    for k in range(levels.shape[1]):
        level, change = levels[~np.isnan(levels[:, k]), k], changes[~np.isnan(changes[:, k]), k]
        out["count"][k], out["change_count"][k] = len(level), len(change)
        if len(level):
            for name in ("mean", "std", "min", "max", "median"):
                out[name][k] = getattr(np, name)(level)
            out["iqr"][k] = np.subtract(*np.percentile(level, [75, 25]))
        if len(change):
            out["change_mean"][k], out["change_std"][k] = change.mean(), change.std()
    return out


def random_cases(seed: int, counts: list[int], missing: float) -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(seed)
    cases = []
    for minutes in counts:
        values = (random.normal(size=(minutes, 5)) * [1, 1e-3, 1e4, 1, 1] + [0, 6, 1e5, 5, -3]).astype(np.float32)
        values[random.random(values.shape) < missing] = np.nan
        values[:, 3] = 5.0
        values[:, 4] = np.nan if missing else 1.0
        cases.append((values[:, :2], values[:, 2:]))
    return cases


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    missing=st.sampled_from([0.0, 0.1, 0.9]),
)
def test_streamed_statistics_equal_those_of_the_whole(seed: int, counts: list[int], missing: float) -> None:
    cases = random_cases(seed, counts, missing)
    found, expected = streamed(cases), at_once(cases)
    assert set(found) == set(STATISTICS)
    # Sums over values around 1e5 round at 1e-11; numpy's order of summing is another, and variances lose more.
    scale = 1 + np.abs(expected["mean"])
    for name in STATISTICS:
        np.testing.assert_allclose(found[name] / scale, expected[name] / scale, rtol=1e-9, atol=1e-9, err_msg=name)


def test_statistics_by_hand() -> None:
    boundary = np.array([[0.0], [0.0], [1.0], [1.0]], np.float32)
    state = np.array([[1, np.nan], [3, 10], [np.nan, 20], [5, 40]], np.float32)
    found = streamed([(boundary, state)])
    expected = {
        "count": [4, 3, 3],
        "mean": [0.5, 3, 70 / 3],
        "std": [0.5, np.sqrt(8 / 3), np.sqrt((100 + 400 + 1600) / 3 - (70 / 3) ** 2)],
        "min": [0, 1, 10],
        "max": [1, 5, 40],
        "median": [0.5, 3, 20],
        "iqr": [1, 2, 15],  # quartiles of 10, 20, 40 are 15 and 30
        "change_count": [3, 1, 2],  # a change needs both minutes
        "change_mean": [1 / 3, 2, 15],
        "change_std": [np.sqrt(2) / 3, 0, 5],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-12, err_msg=name)


def test_no_change_is_taken_from_one_case_to_the_next() -> None:
    low, high = np.zeros((3, 1), np.float32), np.full((3, 1), 100, np.float32)
    found = streamed([(low, low), (high, high)])
    assert found["change_std"].tolist() == [0, 0]
    assert found["change_count"].tolist() == [4, 4]
    assert found["std"].tolist() == [50, 50]


def test_small_spread_on_a_large_level_is_not_lost() -> None:
    values = (1e6 + np.arange(1440) % 2).astype(np.float32)[:, None]  # sums of squares in fp32 would give 0 or NaN
    found = streamed([(values, values)] * 3)
    np.testing.assert_allclose(found["std"], 0.5, rtol=1e-12)


def test_sampled_rows_are_evenly_spaced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sample_positions(5, 3).tolist() == [0, 1, 2, 3, 4]
    monkeypatch.setattr(statistics, "_SAMPLE_VALUES", 12)
    assert sample_positions(40, 3).tolist() == [5, 15, 25, 35]
    assert sample_positions(2**40, 3).tolist() == [(2 * k + 1) * 2**40 // 8 for k in range(4)]
    assert len(sample_positions(3, 100)) == 1
