"""best/: the weights of the best evaluation of the run as it stands.

    BestWeights(folder, task, config, progress).settle(found, ranks)   at the start: best/ and final/ are this run's
    judging(task, config)                                              what evaluations measure, beside the metric
    kept_best(found, folder, progress)                                 the checkpoints of the best step that are kept
    outcome(folder, best, progress, report)                            what a finished run says of them

What makes best/ the run's own is the SHA-256 of its weights, which the state in a checkpoint carries: after a resume
from an earlier step, best/ may hold what was abandoned there.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trunkline.engine.checkpoint.assets import copy_assets
from trunkline.engine.checkpoint.digests import check_digests, recorded, replace_files
from trunkline.engine.checkpoint.export import export_weights
from trunkline.engine.checkpoint.manifest import Checkpoint, verify
from trunkline.engine.checkpoint.weights import WEIGHTS, saved_facts
from trunkline.engine.config.run_config import Best, RunConfig
from trunkline.engine.errors import CheckpointError
from trunkline.engine.machine.files import copy_tree, unused
from trunkline.engine.machine.log import LOG
from trunkline.engine.progress import Progress
from trunkline.engine.ranks.distributed import Ranks, from_main, on_main
from trunkline.engine.task import Task

BEST, FINAL = "best", "final"


@dataclass
class BestWeights:
    """The best weights of a run that begins or resumes, by its folder and the state that it begins in.

    changed: after `settle`, in what the evaluations before a resume differ from those to come; empty if they do not
    """

    folder: Path
    task: Task
    config: RunConfig
    progress: Progress
    changed: str = field(init=False, default="")

    @property
    def best(self) -> Best:
        """What is judged by."""
        return self.config.training.best

    def settle(self, found: Checkpoint | None, ranks: Ranks) -> list[str]:
        """Make the best value, best/ and final/ those of the state. Called on all ranks.

        Weights that are of another metric, of an abandoned branch or of an earlier run are set aside under a name. The
        best ones are brought back from the run that this one resumes, or from a checkpoint, if they are there.

        Returns what was done, for whoever starts the run. Raises CheckpointError.
        """
        notes = []
        self.changed = self._judged_otherwise(found) if found is not None else ""
        known = self.progress.best_metric, self.progress.best_mode
        if known[0] and known != (self.best.metric, self.best.mode):
            notes.append(
                f"the best weights so far were judged by {known[0]} ({known[1]}), from now on they are by "
                f"{self.best.metric} ({self.best.mode}): the next evaluation is the first to count"
            )
            self.progress.forget_best()
        elif known[0] and self.changed:
            notes.append(
                f"the best weights so far were judged {self.changed}: the next evaluation is the first to count"
            )
            self.progress.forget_best()

        def put_in_place() -> None:
            notes.extend(note for name in (BEST, FINAL) if (note := self._set_aside(name)))
            if found is not None and self.progress.best is not None and not (self.folder / BEST / WEIGHTS).exists():
                notes.append(self._bring_back(found))

        on_main(put_in_place, ranks, f"{self.folder}: cannot put {BEST}/ in place")
        self.progress.best_weights = from_main(self.progress.best_weights, ranks)
        return notes

    def _judged_otherwise(self, found: Checkpoint) -> str:
        """In what the evaluations before differ from those to come: their values cannot be compared. Empty if not."""
        # one of an earlier version says of the data alone
        before = {"data": found.state.get("data")} | found.state.get("judging", {})
        now = judging(self.task, self.config).items()
        changed = {key: value for key, value in now if before.get(key, value) != value}
        if "data" in changed:  # digests, which say nothing to a person
            return "on other data than this run has"
        return ", ".join(f"with {key} {before[key]}, and it is {value} now" for key, value in changed.items())

    def _set_aside(self, name: str) -> str | None:
        held = self.folder / name
        if not (held / WEIGHTS).exists():
            return None
        step = saved_facts(held).get("step", math.nan)
        if self._are_in(held) if name == BEST else not step > self.progress.step:
            return None
        label = f"{step:.0f}" if math.isfinite(step) else "unknown"
        target = self.folder / f"aside-{name}-step-{label}"
        if target.exists() and (mine := _weights(held)) is not None and mine == _weights(target):
            shutil.rmtree(target)  # the same weights, set aside by an earlier start
        target = unused(target)
        held.rename(target)
        return (
            f"{held} holds weights of step {label} that are not of the run as it resumes from step "
            f"{self.progress.step}; renamed to {target.name}"
        )

    def _are_in(self, held: Path) -> bool:
        """Whether a folder holds the best weights of the state."""
        progress = self.progress
        if progress.best is None:
            return False
        if progress.best_weights:
            return _weights(held) == progress.best_weights
        facts = saved_facts(held)  # a checkpoint of an earlier version names no weights
        return facts.get("step") == progress.best_step and facts.get(self.best.metric) == progress.best

    def _bring_back(self, found: Checkpoint) -> str:
        step = self.progress.best_step
        value = f"the best {self.best.metric} so far, {self.progress.best:.6g} at step {step}"
        folders = [found.path.parent.parent / BEST, *sorted(self.folder.glob(f"aside-{BEST}-step-{step}*"))]
        for source in folders:
            try:
                if self._copy(source):
                    return f"{value}: {BEST}/ is made from {source}"
            except CheckpointError as error:
                LOG.warning(error)
        for kept in kept_best(found, self.folder, self.progress):
            try:
                self._export(kept)
            except CheckpointError as error:
                LOG.warning(error)
            else:
                return f"{value}: {BEST}/ is made from {kept.path}"
        return f"{value}: its weights are not kept, so there is no {BEST}/ before the next gain"

    def _copy(self, other: Path) -> bool:
        """Take another run's best/, if that holds them."""
        if not (other / WEIGHTS).exists() or not self._are_in(other):
            return False
        check_digests(other)
        written = replace_files(self.folder / BEST, lambda draft: copy_tree(other, draft))
        self.progress.best_weights = written[WEIGHTS]["sha256"]
        return True

    def _export(self, kept: Checkpoint) -> None:
        """Take the weights of the checkpoint of the best step."""
        task, progress = self.task, self.progress
        assert progress.best is not None
        facts = {"step": progress.best_step, self.best.metric: progress.best}

        def write(draft: Path) -> None:
            average = progress.best_is_average
            export_weights(kept, draft, 1 << 62, None, task.tensor_name, task.file_tensors, facts, average)
            copy_assets(self.folder, draft)

        progress.best_weights = replace_files(self.folder / BEST, write)[WEIGHTS]["sha256"]


def judging(task: Task, config: RunConfig) -> dict[str, Any]:
    """What the value of a metric depends on beside the weights: only where it is equal can values be compared."""
    num_samples = len(task.dataset("val"))
    eval_samples = min(config.training.eval_samples or num_samples, num_samples)
    further = task.judged_by(config.training.best.metric)
    return {"data": task.fingerprint(), "training.eval_samples": eval_samples} | further


def kept_best(found: Checkpoint, folder: Path, progress: Progress) -> Iterator[Checkpoint]:
    """The checkpoints of the best step beside the one that was found, or in the run's folder, if they are good and of
    this branch. A damaged one is named."""
    name = f"step-{progress.best_step:08d}"
    for path in dict.fromkeys((found.path.parent / name, folder / "checkpoints" / name)):
        try:
            kept = found if path == found.path else verify(path) if path.is_dir() else None
        except CheckpointError as error:
            LOG.warning(error)
            continue
        if kept is not None and (kept.state["step"], kept.state.get("best")) == (progress.best_step, progress.best):
            yield kept


def outcome(folder: Path, best: Best, progress: Progress, report: str) -> str:
    """What a finished run's folder holds, and why there is no best/ if there is none."""
    last = f"{FINAL}/ and {report}"
    if progress.best is None:
        return f"{last}; no {BEST}/: no evaluation has measured a finite {best.metric}"
    value = f"{best.metric} {progress.best:.6g} at step {progress.best_step}"
    if not (folder / BEST / WEIGHTS).exists():
        return f"{last}; no {BEST}/: nothing was better than {value}, whose weights are not here"
    return f"{BEST}/ ({value}), {last}"


def _weights(folder: Path) -> str | None:
    try:
        return recorded(folder, WEIGHTS)
    except (CheckpointError, OSError):
        return None
