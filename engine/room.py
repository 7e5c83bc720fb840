"""Room in memory: what is known to fit, and what happens when memory runs out.

with room.attempt(fits): ...                     raises OutOfMemory, on all ranks alike unless it is known to fit
room.make(run.micro.halve, shortage, intact)     continue with smaller micro-batches, or say how to
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from trunkline.engine.errors import TrunklineError
from trunkline.engine.machine.again import resume_with
from trunkline.engine.machine.files import write_json
from trunkline.engine.memory.shortage import Attempts, Shortage
from trunkline.engine.ranks.distributed import on_main
from trunkline.engine.run import Run


class Room:
    """Every method is called on all ranks.

    longest_step: the longest sample of a step that was made
    evaluation_fits: whether an evaluation was made
    """

    def __init__(self, run: Run) -> None:
        self.run, self._attempts = run, Attempts(run.ranks)
        self.forget()

    def forget(self) -> None:
        """Nothing is known before the first step and the first evaluation."""
        self.longest_step, self.evaluation_fits = -1, False

    def attempt(self, fits: bool = False) -> AbstractContextManager[None]:
        """What is done within raises OutOfMemory, on all ranks alike unless it is known to fit."""
        if not fits:
            self.run.begin("waiting for the checkpoint to be written")
            self.run.checkpoints.wait()  # its thread uses a process group
        return self._attempts.attempt(agreed=not fits)

    def make(
        self, halve: Callable[[int, Shortage, dict[str, Any]], str], shortage: Shortage, intact: bool = True
    ) -> None:
        """Continue with a smaller micro-batch, or say how to. `intact`: no parameter changed since the last step."""
        run, step = self.run, self.run.progress.step
        line = halve(step, shortage, run.assembly.plan)
        if not shortage.agreed or not (intact or step == run.assembly.first_step):
            why = "the optimizer was changing the parameters" if shortage.agreed else "the other ranks are in the step"
            raise TrunklineError(
                f"{line}; {why}, so the run ends here; to continue with that, {resume_with(run.folder)}"
            )
        run.warn(line)
        self.rebuild()
        self.note_sizes()

    def rebuild(self) -> None:
        """Put the run together again for the batch sizes in force."""
        run = self.run
        run.begin("rebuilding the model for other micro-batches")
        run.assembly.rebuild(run.micro.sizes, run.progress, run.checkpoints)
        self.forget()

    def note_sizes(self) -> None:
        """Put the batch sizes in force, which are not the configured ones, into the run's plan and metrics."""
        run, path = self.run, self.run.folder / "plan.json"
        run.log("memory", run.micro.values())
        on_main(lambda: write_json(path, run.assembly.plan), run.ranks, f"{path}: cannot be written")
