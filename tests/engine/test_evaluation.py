"""Evaluation: what ranks say of their own losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest
import torch
from torch import nn

from tests.distributed import run_distributed_test
from tests.engine.tiny import TinyData, TinyModel, TinyTask
from trunkline.engine.evaluation import _compare_ranks, _own_loss, evaluate
from trunkline.engine.ranks.distributed import Ranks
from trunkline.engine.task import Batch, Sums


class NumberTask(TinyTask):
    """The loss of a sample is a number: 1, and more for samples 100 to 199."""

    def __init__(self, more: float) -> None:
        super().__init__(TinyData(), TinyModel())
        self.more = more

    def dataset(self, split: str) -> range:
        return range(350)

    def collate(self, samples: Sequence[int]) -> Batch:
        return {"number": torch.tensor(samples)}

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        loss = torch.where(batch["number"] // 100 == 1, 1.0 + self.more, 1.0)
        return {"loss": (loss * batch["valid"]).sum(), "weight": batch["valid"].sum(), "samples": batch["valid"].sum()}


def measured(rank: int, world_size: int) -> list[tuple[float, str, str]]:
    found = []
    for more, samples, micro_batch_size in ((0.1, None, 100), (1.0, None, 100), (1.0, 6, 2), (1.0, 1, 2)):
        out, err = StringIO(), StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            metrics = evaluate(
                NumberTask(more), nn.Identity(), Ranks(rank, world_size, rank, torch.device("cpu")),
                num_samples=samples, micro_batch_size=micro_batch_size, progress=False,
            )  # fmt: skip
        found.append((metrics["loss"], out.getvalue(), err.getvalue()))
    return found


@pytest.mark.distributed
def test_ranks_whose_own_losses_lie_apart_are_named() -> None:
    """350 samples in batches of 100: ranks 0, 1 and 2 have the first, second and third 100, and rank 0 the rest."""
    (near, apart, few, one), *others = run_distributed_test(measured, 3)
    assert near[0] == pytest.approx((5 + 2 * 1.1) / 7)
    assert near[1].strip() == "val loss of the ranks' own samples: mean 1.03333, std 0.0471, min 1, max 1.1"
    assert near[2] == ""
    assert apart[0] == pytest.approx((5 + 2 * 2.0) / 7)
    assert "mean 1.33333, std 0.471, min 1, max 2" in apart[1]
    assert "\nwarning: rank 1's own val loss is 2, more than 20% off the ranks' mean" in apart[1]
    assert apart[2] == ""
    assert "mean 1.33333, std 0.471, min 1, max 2" in few[1]
    assert "warning" not in few[1], "two samples a rank say nothing"
    assert one[1:] == ("", ""), "one rank alone has a sample"
    assert [line for rank in others for found in rank for line in found[1:]] == [""] * 16


@pytest.mark.parametrize(
    ("by_rank", "said"),
    [
        ([0.3, 9.0], "the two ranks' own val losses are 0.3 and 9, more than 20% off the ranks' mean"),
        ([0.3, 0.31, math.nan], "the val loss of the samples of ranks [2] is not finite"),
        ([0.3, math.nan], "the val loss of the samples of ranks [1] is not finite"),
        ([0.3, None, 0.31], ""),
    ],
)
def test_of_two_ranks_none_is_blamed_and_a_loss_that_is_not_finite_is_named(
    by_rank: list[float | None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _compare_ranks("val", by_rank, Ranks(0, len(by_rank), 0, torch.device("cpu")))
    printed = capsys.readouterr().out
    assert (f"warning: {said}" in printed) if said else "warning" not in printed


def test_a_task_that_cannot_summarize_a_part_keeps_no_rank_waiting() -> None:
    class Whole(NumberTask):
        def summarize(self, sums: Sums) -> dict[str, float]:
            raise ZeroDivisionError

    assert _own_loss(Whole(0.1), {}) is None


def test_one_rank_says_nothing() -> None:
    for _, out, err in measured(0, 1):
        assert (out, err) == ("", "")
