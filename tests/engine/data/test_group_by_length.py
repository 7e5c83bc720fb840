"""training.group_by_length: batches of samples of about one length, in an order that stays a pure function."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.tiny import Rows, TinyTask, tiny_config
from trunkline.engine.checkpoint.resume import _meant
from trunkline.engine.config.deepspeed_section import BatchSizes
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.data.loading import training_loader
from trunkline.engine.data.order import FILLER, GlobalBatches
from trunkline.engine.errors import CheckpointError, ConfigError
from trunkline.engine.plan import planned_batches
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer


def grouped(size: int, batch: int, seed: int = 1) -> GlobalBatches:
    return GlobalBatches(size, batch, seed, np.random.default_rng(size).integers(1, 400, size))


def epoch_of(batches: GlobalBatches, epoch: int = 0) -> list[np.ndarray]:
    steps = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
    return [samples[samples != FILLER] for samples in map(batches.samples, steps)]


@given(size=st.integers(1, 1500), batch=st.integers(1, 20), epoch=st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_an_epoch_holds_every_sample_once_and_only_its_last_batch_is_short(size: int, batch: int, epoch: int) -> None:
    found = epoch_of(grouped(size, batch), epoch)
    assert sorted(np.concatenate(found)) == list(range(size))
    assert [len(samples) for samples in found[:-1]] == [batch] * (len(found) - 1)


def test_fifty_batches_in_a_row_hold_the_samples_that_they_hold_ungrouped() -> None:
    found, plain = epoch_of(grouped(1003, 8)), epoch_of(GlobalBatches(1003, 8, 1))
    assert len(found) == 126
    for first in range(0, 126, 50):
        assert set(np.concatenate(found[first : first + 50])) == set(np.concatenate(plain[first : first + 50]))
    assert found[-1].tolist() == plain[-1].tolist(), "a short batch is not made of the shortest samples"


def test_batches_of_a_group_do_not_overlap_in_length_and_come_in_any_order() -> None:
    batches = grouped(4000, 8)
    assert batches.lengths is not None
    firsts = []
    for epoch in range(3):
        ranges = [(lengths.min(), lengths.max()) for lengths in (batches.lengths[b] for b in epoch_of(batches, epoch))]
        for first in range(0, 500, 50):
            ordered = sorted(ranges[first : first + 50])
            assert all(low[1] <= high[0] for low, high in itertools.pairwise(ordered))
            firsts.append(ordered.index(ranges[first]))
    assert len(set(firsts)) > 10


def test_a_step_does_not_depend_on_which_were_asked_for_before() -> None:
    one, other = grouped(3000, 8), grouped(3000, 8)
    forward = [one.draws(step) for step in range(800)]
    for step in (799, 3, 51, 420, 0, 374, 375):
        assert np.array_equal(other.draws(step), forward[step])
    assert not np.array_equal(forward[0], forward[375])


def test_a_sample_has_the_draw_that_it_has_ungrouped() -> None:
    keys = [
        dict(zip(*np.concatenate([batches.draws(step) for step in range(batches.per_epoch)], axis=1).tolist()))
        for batches in (grouped(300, 8), GlobalBatches(300, 8, 1))
    ]
    assert {sample: keys[0][sample] for sample in range(300)} == {sample: keys[1][sample] for sample in range(300)}


def test_two_sets_of_lengths_are_not_mixed_up() -> None:
    lengths = np.arange(400)
    one, other = GlobalBatches(400, 8, 1, lengths), GlobalBatches(400, 8, 1, lengths % 7)
    assert np.ptp(lengths[one.samples(0)]) < 9
    assert len(set((lengths % 7)[other.samples(0)])) <= 2


def test_padding_shrinks_as_it_should() -> None:
    """Log-normal lengths: the share of real tokens in batches of 16 that are padded to the longest."""
    lengths = np.clip(np.random.default_rng(0).lognormal(4, 0.9, 20_000).astype(np.int64), 2, 512)
    share = {}
    for name, given_lengths in (("random", None), ("grouped", lengths)):
        found = epoch_of(GlobalBatches(len(lengths), 16, 1, given_lengths))
        share[name] = lengths.sum() / sum(lengths[samples].max() * len(samples) for samples in found)
    assert share["random"] < 0.4
    assert share["grouped"] > 0.93


class Measured(TinyTask):
    """Its samples say how many points they have."""

    def dataset(self, split: str) -> Rows:
        rows = super().dataset(split)
        rows.lengths = np.array([len(rows[place][0]) for place in range(len(rows))])  # type: ignore[attr-defined]
        return rows


@pytest.mark.parametrize("world", [2, 4])
def test_a_global_batch_is_the_same_on_any_number_of_ranks(tmp_path: Path, world: int) -> None:
    config = tiny_config(tmp_path, training={"group_by_length": True})
    task = Measured(config.data, config.model)

    def draws(world: int, workers: int = 0) -> list[list[int]]:
        """Of each step, in the order of the global batch."""
        sizes = BatchSizes(8, 1, 8 // world, world)
        batches, data = planned_batches(task, config, world, sizes), task.dataset("train")
        spans = {"first_step": 2, "last_step": 9, "num_workers": workers, "pin_memory": False}
        ranks = [list(training_loader(task, data, batches, sizes, rank, **spans)) for rank in range(world)]  # type: ignore[arg-type]
        return [
            [int(ranks[rank][step][micro]["draw"]) for micro in range(8 // world) for rank in range(world)]
            for step in range(7)
        ]

    assert draws(world) == draws(1) == draws(1, workers=2)


def run(config: RunConfig, folder: Path, resume: str = "none") -> list[Any]:
    Trainer(Measured(config.data, config.model), config, start(), folder, resume=resume).run()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"]


def test_a_run_is_grouped_and_resumes_where_it_was(tmp_path: Path) -> None:
    by_length = {"group_by_length": True, "steps": 6}
    constant = {"scheduler": None}
    whole = run(tiny_config(tmp_path / "a", training=by_length, deepspeed=constant), tmp_path / "whole")
    run(tiny_config(tmp_path / "b", training=by_length | {"steps": 4}, deepspeed=constant), tmp_path / "parts")
    assert run(tiny_config(tmp_path / "c", training=by_length, deepspeed=constant), tmp_path / "parts", "auto") == whole
    assert json.loads((tmp_path / "parts/config.json").read_text())["training"]["group_by_length"] is True
    plain = tiny_config(tmp_path / "d", training={"steps": 6}, deepspeed=constant)
    assert whole != run(plain, tmp_path / "plain")


@pytest.mark.parametrize("before", [False, True])
def test_a_run_is_not_resumed_in_another_order(tmp_path: Path, before: bool) -> None:
    run(tiny_config(tmp_path / "a", training={"steps": 4, "group_by_length": before}), tmp_path / "run")
    with pytest.raises(
        CheckpointError, match=f"was written with group_by_length {before}, but this run has {not before}"
    ):
        run(tiny_config(tmp_path / "b", training={"group_by_length": not before}), tmp_path / "run", "auto")


def test_a_checkpoint_of_before_there_was_the_setting_is_resumed() -> None:
    assert _meant("group_by_length", None, None) is False


def test_samples_that_do_not_say_their_length_cannot_be_grouped(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, training={"group_by_length": True})
    with pytest.raises(
        ConfigError, match=r"training\.group_by_length: the samples of .* do not differ in length.*false"
    ):
        planned_batches(TinyTask(config.data, config.model), config, 1)
