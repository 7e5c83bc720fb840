"""Batches are the same whoever makes them, and hold what the order of samples says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.engine.tiny import TinyData, TinyModel, TinyTask
from trunkline.engine.config.deepspeed_section import BatchSizes
from trunkline.engine.data.loading import evaluation_loader, training_loader
from trunkline.engine.data.order import FILLER, GlobalBatches
from trunkline.engine.errors import DataError
from trunkline.engine.task import Batch, Samples

TASK = TinyTask(TinyData(samples=21), TinyModel())
SIZES = BatchSizes(global_batch_size=8, micro_batch_size=2, grad_accum_steps=2, world_size=2)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_batches_of_a_step_are_the_rank_s_share_of_the_order(rank: int, num_workers: int) -> None:
    """From step 2 to 6: over the end of an epoch, whose last batch is short."""
    order, rows = GlobalBatches(21, 8, seed=3), TASK.dataset("train")
    made = training_loader(
        TASK, rows, order, SIZES, rank, first_step=2, last_step=7, num_workers=num_workers, pin_memory=False
    )
    steps = list(made)
    assert [len(micro_batches) for micro_batches in steps] == [2] * 5
    for step, micro_batches in enumerate(steps, 2):
        samples, keys = order.draws(step).reshape(2, 2, 2, 2)[:, :, rank]
        for micro, batch in enumerate(micro_batches):
            assert batch["valid"].tolist() == [sample != FILLER for sample in samples[micro]]
            assert batch["draw"].tolist() == keys[micro].tolist()
            expected = TASK.collate([rows[max(0, sample)] for sample in samples[micro].tolist()])
            assert all(torch.equal(batch[key], expected[key]) for key in expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_evaluation_holds_every_sample_once_on_all_ranks_together(num_workers: int) -> None:
    loaders = [
        evaluation_loader(
            TASK, TASK.dataset("val"), num_samples=None, micro_batch_size=2, world_size=3, rank=rank,
            num_workers=num_workers,
        )
        for rank in range(3)
    ]  # fmt: skip
    assert [len(loader) for loader in loaders] == [2, 2, 2]
    x = torch.cat([batch["x"][batch["valid"]] for loader in loaders for batch in loader])
    assert sorted(x.sum((1, 2)).tolist()) == sorted(
        TASK.collate([TASK.dataset("val")[index] for index in range(11)])["x"].sum((1, 2)).tolist()
    )


class _Together:
    """Reads many samples at once, and one alone not at all."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> object:
        raise AssertionError("read one by one")

    def __getitems__(self, indices: list[int]) -> list[object]:
        rows = TASK.dataset("val")
        return [rows[index] for index in indices]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_samples_that_can_be_read_together_are(num_workers: int) -> None:
    def read(dataset: Samples) -> list[Batch]:
        return list(
            evaluation_loader(
                TASK, dataset, num_samples=None, micro_batch_size=3, world_size=1, rank=0, num_workers=num_workers
            )
        )

    rows = [TASK.dataset("val")[index] for index in range(4)]
    for together, alone in zip(read(_Together()), read(rows), strict=True):
        assert all(torch.equal(together[key], alone[key]) for key in alone)


class _Unreadable:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> object:
        raise DataError("a.jpg: cannot be decoded")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_of_the_data_is_the_same_whoever_makes_the_batches(num_workers: int) -> None:
    loader = evaluation_loader(
        TASK, _Unreadable(), num_samples=None, micro_batch_size=2, world_size=1, rank=0, num_workers=num_workers
    )
    with pytest.raises(DataError) as caught:
        list(loader)
    assert str(caught.value) == "a.jpg: cannot be decoded"


def test_chosen_samples_of_an_evaluation_are_evenly_spaced() -> None:
    loader = evaluation_loader(TASK, TASK.dataset("val"), num_samples=3, micro_batch_size=2, world_size=1, rank=0)
    x = torch.cat([batch["x"][batch["valid"]] for batch in loader])
    expected = TASK.collate([TASK.dataset("val")[int(index)] for index in np.array([0, 3, 7])])["x"]
    assert torch.equal(x, expected)


def test_a_micro_batch_of_an_evaluation_is_no_larger_than_what_is_evaluated() -> None:
    data = TASK.dataset("val")
    (batch,) = evaluation_loader(TASK, data, num_samples=None, micro_batch_size=10**15, world_size=1, rank=0)
    assert batch["valid"].tolist() == [True] * len(data)
