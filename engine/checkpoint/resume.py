"""Which checkpoint a run resumes from, and whether it may.

    none       start at step 0; refused where an earlier run has left anything
    auto       the newest good checkpoint of the run's own folder; step 0 if it never saved one, and then what it logged
               until it was killed is set aside; refused where its checkpoints are gone
    PATH       a run's folder or one checkpoint; refused where another run has left anything

A checkpoint does not depend on the backend, the ZeRO stage, the precision or the number of ranks: those may differ. The
model, the optimizer, the order of samples and the data set must not. Another data set may be accepted, but not one of
other tokens, classes or columns. Optimizer and schedule settings, such as the learning rate, are the new
configuration's.
"""

from __future__ import annotations

import json
import math
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import nn

from trunkline.engine.backends import Backend
from trunkline.engine.checkpoint.checkpoints import BACKEND, Checkpoints
from trunkline.engine.checkpoint.manifest import Checkpoint
from trunkline.engine.config.deepspeed_section import parameter_dtype
from trunkline.engine.config.meaning import meaning_of
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.config.strict import show
from trunkline.engine.data.loading import collate
from trunkline.engine.data.order import GlobalBatches
from trunkline.engine.data.randomness import GENERATOR
from trunkline.engine.errors import CheckpointError, ConfigError
from trunkline.engine.evaluation import to_device
from trunkline.engine.machine.again import resume_with
from trunkline.engine.optim.optimizers import same_name
from trunkline.engine.ranks.distributed import Ranks, from_main, on_main
from trunkline.engine.record.run_folder import had_checkpoints, records, set_records_aside
from trunkline.engine.state.sharded_state import Averages, restore
from trunkline.engine.task import Batch, Task

DATA = ("data", "num_samples")
LAYOUT, GROUPED, MEANING, DRAWN = "layout", "group_by_length", "meaning", "generator"
UNSAID = (MEANING, DRAWN)
"""What an earlier version did not write down."""


def identity(task: Task, config: RunConfig, backend: str, world_size: int, batches: GlobalBatches) -> dict[str, Any]:
    """What a checkpoint and the run that takes it up must have in common, and the layout, in which they may differ."""
    section = config.deepspeed
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(parameter_dtype(section), "fp32")
    return {
        LAYOUT: f"{backend} ZeRO {section.zero_optimization.stage}, {precision}, "
        f"{world_size} rank{'s' * (world_size > 1)}",
        "workload": config.workload,
        "model": meaning_of(config.model),
        "optimizer": same_name(section.optimizer.type),
        MEANING: task.meaning(),  # before the data, which may be other ones if they mean the same
        "data": task.fingerprint(),
        "num_samples": batches.num_samples,
        "global_batch_size": batches.global_batch_size,
        "seed": batches.seed,
        GROUPED: batches.lengths is not None,
        DRAWN: GENERATOR,
    }


def find_checkpoint(
    resume: str,
    checkpoints: Checkpoints,
    identity: dict[str, Any],
    total_steps: int,
    accept_new_data: bool,
    model: type[BaseModel] | None = None,
) -> Checkpoint | None:
    """The checkpoint to resume from, verified and fitting this run; None to start at step 0. Called on all ranks.

    `model` is the class of the model section, by which the checkpoint's is read: what is compared is what it means.

    Raises:
        ConfigError: the folder holds what an earlier run has left, and it would be lost.
        CheckpointError: nothing can be loaded, or it is of a run that differs in what `identity` tells.
    """
    own = checkpoints.folder
    left = from_main(records(own.parent), checkpoints.ranks)
    remedy = "give another --output-dir, or move the folder away or delete it"
    if resume == "none":
        if left:
            raise ConfigError(
                f"{own.parent}: holds {', '.join(left)} of an earlier run; {resume_with(own.parent)}, {remedy}"
            )
        return None
    if resume == "auto":
        found = checkpoints.newest()
        if found is None:
            if from_main(had_checkpoints(own.parent), checkpoints.ranks):
                raise CheckpointError(
                    f"{own.parent}: holds {', '.join(left)} of an earlier run, but its checkpoints are gone, so "
                    f"--resume auto has nothing to resume from; put them back, {remedy}"
                )
            on_main(lambda: set_records_aside(own.parent), checkpoints.ranks, f"{own.parent}: cannot be used")
            return None
    elif not resume:  # as of an unset variable, which must not start the run afresh
        raise CheckpointError("--resume: give none, auto or the path of a run or a checkpoint, found ''")
    else:
        path = Path(resume)
        found = None
        try:
            inside = own.parent.resolve() in (path.resolve(), *path.resolve().parents)
            inside, is_run, is_folder = from_main(
                (inside, (path / "checkpoints").is_dir(), path.is_dir()), checkpoints.ranks
            )
        except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL: on every rank
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"--resume {show(resume)}: cannot be read ({reason}); give a run's folder") from error
        if left and not inside:
            raise ConfigError(
                f"{own.parent}: holds {', '.join(left)} of an earlier run, and --resume {resume} is another one; "
                f"{resume_with(own.parent)}, {remedy}"
            )
        if is_run:
            found = Checkpoints(path / "checkpoints", checkpoints.ranks, checkpoints.keep_last).newest()
        elif is_folder:
            found = checkpoints.load(path)
        if found is None and inside:
            raise CheckpointError(
                f"{resume:.200}: there is no checkpoint in it to resume from: train without that first, or give "
                "another --output-dir"
            )
        if found is None:
            raise CheckpointError(
                f"--resume {resume:.200}: there is no checkpoint in it; give a run's folder or a checkpoint's, or the "
                "file of another program"
            )
    _check_identity(found, identity, accept_new_data, model)
    if found.state["step"] > total_steps:
        raise CheckpointError(
            f"{found.path}: is at step {found.state['step']}, past this run's last step {total_steps}"
        )
    return found


def _check_identity(
    found: Checkpoint, identity: dict[str, Any], accept_new_data: bool, model: type[BaseModel] | None
) -> None:
    for key, mine in identity.items():
        if key == MEANING:
            _check_meaning(found, mine)
            continue
        theirs = _meant(key, found.state.get(key), model)
        if theirs == mine or key in (LAYOUT, DRAWN) or (accept_new_data and key in DATA):
            continue
        what = f"with {key} {theirs!r}, but this run has {mine!r}"
        if key == DATA[0]:  # digests, which say nothing to a person
            what = "with other data than this run has"
        remedy = "--accept-new-data takes the data set as it is now" if key in DATA else "make them equal"
        raise _other_run(found, what, remedy)


def _check_meaning(found: Checkpoint, ours: dict[str, Any]) -> None:
    """By what both say: an earlier version, or an earlier form of the task, said less."""
    for key, mine in ours.items():
        theirs = found.state.get(MEANING, {}).get(key, mine)
        if theirs == mine:
            continue
        if isinstance(theirs, list) and isinstance(mine, list):  # of classes, say: the first that differs
            place = next(place for place, pair in enumerate(zip_longest(theirs, mine)) if pair[0] != pair[1])
            key, theirs, mine = f"{key}[{place}]", theirs[place : place + 1], mine[place : place + 1]
        raise _other_run(found, f"with {key} {theirs!r}, but this run has {mine!r}", "make them equal")


def _other_run(found: Checkpoint, what: str, remedy: str) -> CheckpointError:
    return CheckpointError(f"{found.path}: was written {what}; {remedy}, or start afresh in another folder for the run")


def _meant(key: str, value: Any, model: type[BaseModel] | None) -> Any:
    """What a checkpoint says, as `identity` says it: an earlier version wrote it down as it was spelt."""
    if key == GROUPED:
        return bool(value)
    if key == "optimizer" and isinstance(value, str):
        return same_name(value)
    if key == "model" and model is not None:
        try:
            return meaning_of(model.model_validate_json(json.dumps(value)))
        except ValueError:  # of another workload, or of another version of this one
            return value
    return value


def restore_checkpoint(found: Checkpoint, backend: Backend, ranks: Ranks, averages: Averages | None = None) -> None:
    """Put a checkpoint's state into the backend. Called on all ranks, before the first step. Raises CheckpointError."""
    restore(backend, found.path / BACKEND, found.digests, ranks, averages)
    backend.restore_derived(found.state["step"] - found.state["skipped_steps"], found.state["loss_scaler"])


class Probe:
    """The loss of one fixed sample, the first of the validation split: the same before a save and after a load.

    Digests prove that every element has come back to its place; this proves that the model makes the same of them.
    Every method is called on all ranks, which all compute the same.
    """

    def __init__(self, task: Task, model: nn.Module, device: torch.device) -> None:
        self.task, self.model, self.device = task, model, device

    @cached_property
    def _batch(self) -> Batch:
        first = np.zeros(1, dtype=np.int64)
        return to_device(collate(self.task, [self.task.dataset("val")[0]], [first, first]), self.device)

    @torch.no_grad()
    def loss(self) -> float:
        """The mean loss of the sample, with the model in eval mode."""
        was_training = self.model.training
        self.model.eval()
        loss = self.task.loss(self.model, self._batch)["loss"] / self.task.weight(self._batch)
        self.model.train(was_training)
        return float(loss)

    def check(self, found: Checkpoint, layout: str) -> None:
        """Compare with what the checkpoint noted. Raises CheckpointError if it is not the same to rounding."""
        loss, saved = self.loss(), found.probe_loss
        tolerance = 1e-3 if "fp32" in layout and "fp32" in found.state[LAYOUT] else 0.05
        if math.isfinite(saved) and not math.isclose(loss, saved, rel_tol=tolerance):
            raise CheckpointError(
                f"{found.path}: the loss of the probe sample was {saved:g} when it was saved and is {loss:g} now, "
                "although every parameter is as it was: the model's code, its configuration or the sample has changed"
            )
