"""Checkpoints in the form of another program: a task writes one at each new best, and reads one to start from.

    best = NewBest(...)
    best.hand_over(path)                       when the checkpoint at `path` is whole: write_best gets its state
    best.settle(found, progress, begun_with)   at the start: the task has that of the branch that runs, or none
    start_from(other, ...)                     what the task's read_state finds, as a checkpoint of the run's own

So weights, optimizer and step hold on any backend, stage and number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trunkline.engine.checkpoint.best import kept_best
from trunkline.engine.checkpoint.checkpoints import BACKEND, Checkpoints
from trunkline.engine.checkpoint.manifest import Checkpoint
from trunkline.engine.config.deepspeed_section import DeepSpeedSection
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.data.order import GlobalBatches
from trunkline.engine.errors import CheckpointError, ConfigError
from trunkline.engine.machine.log import LOG
from trunkline.engine.optim.optimizers import build_optimizer
from trunkline.engine.optim.schedules import build_scheduler
from trunkline.engine.progress import UNCOUNTED, Progress
from trunkline.engine.ranks.distributed import Ranks, from_main, on_main
from trunkline.engine.state.whole import read_whole, whole_snapshot
from trunkline.engine.task import Task
from trunkline.engine.whole_state import WholeState


@dataclass(frozen=True)
class NewBest:
    """The best evaluation so far, as the task is told of it: fixed, for training continues meanwhile."""

    task: Task
    folder: Path
    names: Sequence[str]
    section: DeepSpeedSection
    metrics: Mapping[str, float]
    step: int
    applied_steps: int
    steps_per_epoch: int
    total_steps: int
    average: bool

    def hand_over(self, path: Path) -> None:
        """Let the task write what it likes of the checkpoint at `path`. A run never ends for it."""
        try:
            self.task.write_best(self.folder, lambda: self._state(path))
        except Exception as error:  # a full disk, or the task's own code
            self._warn(error)

    def settle(self, found: Checkpoint | None, progress: Progress, begun_with: str | None) -> None:
        """At the start: let the task put away what is of another branch, and write what it lacks of this one, which a
        kill may have prevented. `begun_with`: training.start_from."""
        if begun_with and not self.metrics and Path(begun_with).resolve().parent == self.folder.resolve():
            return  # until the first evaluation is better, that is the task's file
        best = None
        if progress.best is not None:
            metrics = {progress.best_metric: progress.best} | dict(self.metrics)
            best = WholeState(self.step, self.steps_per_epoch, {}, {}, metrics=metrics)

        def state() -> WholeState:
            assert found is not None
            kept = next(kept_best(found, self.folder, progress), None)
            if kept is None:
                raise CheckpointError("its checkpoint is not kept, which training.keep_best does")
            return replace(self, applied_steps=self.step - kept.state["skipped_steps"])._state(kept.path)

        try:
            if not self.task.keeps_best(self.folder, best) and found is not None and self.metrics:
                self.task.write_best(self.folder, state)
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        LOG.warning(
            f"step {self.step}: the task could not write the new best ({type(error).__name__}: {error}): it is tried "
            "again when the run is resumed, and the next best is written all the same"
        )

    def _state(self, path: Path) -> WholeState:
        parameters, buffers, kept = read_whole(path / BACKEND, self.names, self.average)
        settings = {} if self.section.optimizer.is_deepspeed_only else self._settings()
        return WholeState(
            self.step, self.steps_per_epoch, parameters, buffers, kept, settings, self.metrics
        )  # fmt: skip

    def _settings(self) -> dict[str, Any]:
        """The optimizer's settings with which the step was made."""
        optimizer = build_optimizer([nn.Parameter(torch.zeros(1))], self.section.optimizer)
        schedule = build_scheduler(optimizer, self.section.scheduler, self.total_steps)
        schedule.forward(max(0, self.applied_steps - 1))
        return {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}


def start_from(
    other: str, found: Checkpoint | None, task: Task, config: RunConfig, checkpoints: Checkpoints,
    identity: dict[str, Any], total_steps: int, batches: GlobalBatches,
) -> tuple[Checkpoint, list[str]]:  # fmt: skip
    """The checkpoint to begin with: what another program has saved at `other`, written as one of the run's own.

    What the run itself has saved before, `found`, comes first. Called on all ranks.

    Returns it, and lines for whoever starts the run.

    Raises:
        ConfigError: `found` was made from what lies elsewhere.
        CheckpointError: on all ranks, if `other` cannot be read.
    """
    path = Path(other)
    if found is not None:
        if (before := found.state.get("started_from", str(path))) != str(path):
            raise ConfigError(
                f"training.start_from: {path}: {found.path} was made from {before}: name that, or another --output-dir"
            )
        return found, [f"note: {found.path} is resumed from, so {path} is left out"]
    notes: list[str] = []

    def write() -> Path:
        state = task.read_state(path, batches.per_epoch)
        notes.extend(state.notes)
        if state.step >= total_steps:
            where = f"is at step {state.step}"
            remedy = f"more than {state.step / batches.per_epoch:g} epochs, or {state.step} steps"
            if state.step > total_steps:
                raise CheckpointError(f"{path}: {where}, past this run's last step {total_steps}: ask for {remedy}")
            notes.append(f"{where}, this run's last, so nothing is trained: ask for {remedy}")
        kept = state.kept
        held = {key for of_one in kept.values() for key in of_one}
        if held and held != (ours := _kept_by(config.deepspeed)):
            kind = config.deepspeed.optimizer.type
            theirs = ", ".join(sorted(held))
            mine = "what only DeepSpeed knows" if ours is None else ", ".join(sorted(ours)) or "nothing"
            notes.append(f"its optimizer keeps {theirs}, and {kind} keeps {mine}: that is left out")
            kept = {}
        progress, best = Progress(step=state.step), config.training.best
        if math.isfinite(value := state.metrics.get(best.metric, math.nan)):
            progress.best, progress.best_step = value, state.step
            progress.best_metric, progress.best_mode = best.metric, best.mode
        alone = Checkpoints(checkpoints.folder, Ranks(0, 1, 0, torch.device("cpu")), checkpoints.keep_last)
        try:
            snapshot = whole_snapshot(state.parameters, state.buffers, kept)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        trainers = asdict(progress) | UNCOUNTED | identity | {"loss_scaler": {}, "started_from": str(path)}
        return alone.save(snapshot, trainers, math.nan, in_background=False)

    written: list[Path] = []
    on_main(lambda: written.append(write()), checkpoints.ranks, f"{path}: cannot be read into a checkpoint")
    where = from_main(written[0] if written else None, checkpoints.ranks)
    assert where is not None
    taken = checkpoints.load(where)
    return taken, [f"the run begins with {path}, now {taken.path}", *(f"note: {path}: {note}" for note in notes)]


def _kept_by(section: DeepSpeedSection) -> set[str] | None:
    """The keys of what the run's optimizer keeps for a parameter; None of one that is built by DeepSpeed alone."""
    if section.optimizer.is_deepspeed_only:
        return None
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = build_optimizer([parameter], section.optimizer)
    parameter.grad = torch.zeros(1)
    optimizer.step()
    return {key for key, value in optimizer.state[parameter].items() if value is not None}
