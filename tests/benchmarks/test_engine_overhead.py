from __future__ import annotations

import pytest

from tests.distributed import run_distributed_test
from trunkline.benchmarks.engine_overhead import judge, measure


def _measure(rank: int, world_size: int, backend: str, stage: int, bf16: bool) -> list[tuple[float, float]]:
    return measure(tensors=12, pairs=12, stage=stage, backend=backend, bf16=bf16, batch_size=4)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("backend", "stage", "bf16"),
    [("deepspeed", 0, False), ("deepspeed", 2, True), ("fsdp", 1, True), ("fsdp", 3, False)],
)
def test_every_step_of_ours_is_paired_with_a_bare_one(backend: str, stage: int, bf16: bool) -> None:
    (pairs,) = run_distributed_test(_measure, 1, backend, stage, bf16, backend=None)
    assert len(pairs) == 12
    assert all(0 < seconds < 10 for pair in pairs for seconds in pair)


def test_the_verdict_is_on_pairs_so_a_slow_moment_of_the_machine_does_not_count() -> None:
    quiet = [(1.005, 1.0)] * 60
    disturbed = [(7.035, 7.0)] * 40  # both of a pair, seven times as slow
    verdict = judge(quiet + disturbed)
    assert verdict.ratio.median == pytest.approx(1.005)
    assert verdict.ratio.low <= verdict.ratio.median <= verdict.ratio.high
    assert verdict.within_limit


def test_a_small_step_may_cost_100_microseconds_and_a_large_one_a_percent() -> None:
    assert judge([(0.00109, 0.001)] * 20).within_limit
    assert not judge([(0.00111, 0.001)] * 20).within_limit
    assert judge([(0.1009, 0.1)] * 20).within_limit
    assert not judge([(0.1012, 0.1)] * 20).within_limit


def test_the_interval_widens_with_the_scatter_of_the_ratios() -> None:
    verdict = judge([(1 + 0.001 * (number % 101), 1.0) for number in range(101)])
    assert verdict.ratio.median == pytest.approx(1.05)
    assert 1.03 < verdict.ratio.low < 1.05 < verdict.ratio.high < 1.07
