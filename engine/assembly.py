"""A run put together: plan, model, backend and probe.

It is put together for given batch sizes, and again for others in the same state.

assembly = Assembly(task, config, ranks, "deepspeed", total_steps, identity, found)
assembly.build(sizes)                          what step 0 begins with
progress = assembly.restore()                  or what the checkpoint holds that was found
assembly.rebuild(sizes, progress, checkpoints)   the same state, in this process, after an interrupted step too
"""

from __future__ import annotations

import gc
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from typing import Any

import torch

from trunkline.engine.backends import Backend, prepare_backend
from trunkline.engine.backends.averaging import WeightAverage
from trunkline.engine.backends.model_options import apply_options
from trunkline.engine.checkpoint.best import judging
from trunkline.engine.checkpoint.checkpoints import BACKEND, Checkpoints
from trunkline.engine.checkpoint.manifest import Checkpoint
from trunkline.engine.checkpoint.resume import DATA, DRAWN, LAYOUT, Probe, restore_checkpoint
from trunkline.engine.config.deepspeed_section import BatchSizes
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.data.randomness import seed_torch
from trunkline.engine.machine.hardware import reset_peak_memory
from trunkline.engine.optim.followed import followed, note_of_change
from trunkline.engine.optim.parameter_rules import freeze, notes_of_earlier_version, notes_of_resume
from trunkline.engine.optim.statistics import Statistics
from trunkline.engine.plan import make_plan
from trunkline.engine.progress import UNCOUNTED, Progress
from trunkline.engine.ranks.agreement import agree
from trunkline.engine.ranks.distributed import Ranks, on_main
from trunkline.engine.ranks.start_facts import tensor_digests
from trunkline.engine.state.sharded_files import ShardedFiles
from trunkline.engine.state.sharded_state import Snapshot, capture
from trunkline.engine.task import Task


class Assembly:
    """Every method is called on all ranks.

    Args:
        task, config, ranks, total_steps: the run's.
        backend_name: which engine shards the model.
        identity: what a checkpoint of the run must have in common with it (`engine/checkpoint/resume.py::identity`).
        found: the checkpoint that the run resumes from.
        begin: told what is begun, on all ranks alike.
    """

    plan: dict[str, Any]
    backend: Backend
    probe: Probe

    def __init__(
        self, task: Task, config: RunConfig, ranks: Ranks, backend_name: str, total_steps: int,
        identity: dict[str, Any], found: Checkpoint | None, begin: Callable[[str], None] = lambda doing: None,
    ) -> None:  # fmt: skip
        self.task, self.config, self.ranks, self.backend_name = task, config, ranks, backend_name
        self.total_steps, self.identity, self.found, self._begin = total_steps, identity, found, begin
        self.notes: list[str] = []
        self.resumed: dict[str, str | float] = {}
        """What `restore` has found, as a line of metrics.jsonl says it: see record/metrics_file.py."""

    @cached_property
    def judging(self) -> dict[str, Any]:
        """What the run's evaluations measure: see engine/checkpoint/best.py."""
        return judging(self.task, self.config)

    @property
    def first_step(self) -> int:
        """The step that this process began with."""
        return self.found.state["step"] if self.found else 0

    def build(self, sizes: BatchSizes, state: Checkpoint | None = None) -> None:
        """Plan, model, backend and probe, as they are at step 0, ready to load `state`, or what was found."""
        self._begin("building the model")
        seed_torch(self.config.training.seed, 0)
        state = state or self.found
        kept = ShardedFiles(state.path / BACKEND).kept() if state else {}
        model = self.task.build_model()
        if state is None:
            self.task.initialize(model)
        model = freeze(model, self.config)
        self.notes = notes_of_resume(model, kept)
        if self.found and "averaged" not in self.found.state:
            self.notes += notes_of_earlier_version(model, self.config)
        first = not hasattr(self, "plan")
        if first and self.ranks.world_size > 1:  # before a backend shards it, or gives rank 0's to all
            digests = tensor_digests(model)
            self._begin("comparing the initial parameters")  # which waits for the others
            agree(digests, last=True)
        self.plan = make_plan(self.task, self.config, self.ranks.world_size, model, sizes, backend=self.backend_name)
        model = apply_options(model, self.config.training)
        self._begin("preparing the backend")
        self.backend = prepare_backend(self.backend_name, model, self.config, sizes, self.ranks, self.total_steps, kept)
        self.notes += self.backend.notes
        self.statistics = Statistics(self.backend.module, self.task.running_statistics(self.backend.module), self.ranks)
        self.average = WeightAverage(self.backend, self.config.training.ema, self.statistics.buffers)
        self.probe = Probe(self.task, self.backend.model, self.ranks.device)

    def restore(self) -> Progress:
        """Put the state of the checkpoint that was found, if any, into what was built. Raises CheckpointError."""
        if self.found is None:
            return Progress()
        self._restore(self.found)
        state = self.found.state
        self.resumed = {"from": state.get("started_from", state[LAYOUT]), "to": self.identity[LAYOUT]}
        if state.get(DRAWN) != self.identity[DRAWN]:
            self.notes.append(
                f"{self.found.path}: is of another version, which drew normal random numbers otherwise: noise is "
                "another from here on, and the loss of the probe sample is not compared"
            )
        elif all(state[key] == value for key, value in self.identity.items() if key in DATA):
            self.probe.check(self.found, self.identity[LAYOUT])  # else the sample may be another one
        # what a checkpoint of an earlier version lacks is as it is at the beginning, or not known
        begin = asdict(Progress()) | UNCOUNTED
        progress = Progress(**{name: self.found.state.get(name, value) for name, value in begin.items()})
        if "schedule" in self.found.state:
            before, rate = self.found.state["schedule"], self.backend.learning_rate()
            if said := note_of_change(before, followed(self.config, self.total_steps), progress.step, rate):
                self.notes += said
                self.resumed |= {"lr_before": before["rate"], "lr_after": rate}
        return progress

    def applied(self, progress: Progress) -> None:
        """After a step that was applied: statistics of its data, and the weights' average."""
        self.statistics.settle()
        progress.averaged = self.average.update(progress.averaged, progress.step - progress.skipped_steps)

    def state(self, progress: Progress) -> tuple[Snapshot, dict[str, Any]]:
        """What a checkpoint holds: the sharded part, copied to the CPU, and the trainer's."""
        schedule = followed(self.config, self.total_steps) | {"rate": self.backend.learning_rate()}
        trainers = asdict(progress) | self.identity | {
            "loss_scaler": self.backend.loss_scaler(), "schedule": schedule, "judging": self.judging
        }  # fmt: skip
        return capture(self.backend, self.average.of), trainers

    def rebuild(self, sizes: BatchSizes, progress: Progress, checkpoints: Checkpoints) -> None:
        """Everything anew for other sizes, in the state that it is in, or in that of the first step if no other has
        been made. A step that was interrupted before its update may leave whatever it likes behind: nothing of the old
        backend is used but the parameters and the optimizer's state. Takes the time of a blocking save and a start."""
        checkpoints.wait()
        state, held = self.found, None
        if progress.step != self.first_step:
            held = Checkpoints(checkpoints.folder.parent / ".held", checkpoints.ranks, keep_last=1)
            # without the probe, whose forward may not pass through the old backend
            state = held.load(held.save(*self.state(progress), probe_loss=math.nan, in_background=False))
        self.release()
        self.build(sizes, state)
        if state is not None:
            self._restore(state)
        if held is not None:
            on_main(lambda: shutil.rmtree(held.folder), self.ranks, f"{held.folder}: cannot be removed")

    def _restore(self, state: Checkpoint) -> None:
        restore_checkpoint(state, self.backend, self.ranks, self.average.of)
        self.statistics.agree()
        self.average.agree(self.statistics.buffers, self.ranks)

    def release(self) -> None:
        """Let go of the model and all that was made for it, if that is still there."""
        if not hasattr(self, "backend"):
            return
        self.backend.close()
        del self.backend, self.probe, self.average, self.statistics
        gc.collect()
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
        reset_peak_memory(self.ranks.device)  # what is shown is of the present sizes
