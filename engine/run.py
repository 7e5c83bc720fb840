"""A run as its parts see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from trunkline.engine.assembly import Assembly
from trunkline.engine.backends import Backend
from trunkline.engine.checkpoint.best import BEST
from trunkline.engine.checkpoint.checkpoints import Checkpoints
from trunkline.engine.checkpoint.weights import save_weights
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.data.order import GlobalBatches
from trunkline.engine.errors import TrunklineError
from trunkline.engine.machine.again import resume_with
from trunkline.engine.machine.log import LOG
from trunkline.engine.memory.micro_batch import MicroBatches
from trunkline.engine.progress import Progress
from trunkline.engine.ranks.distributed import Ranks, lost_a_rank
from trunkline.engine.ranks.lookout import Lookout
from trunkline.engine.ranks.watchdog import Watchdog
from trunkline.engine.record.metrics_file import position
from trunkline.engine.record.trackers import At, Trackers
from trunkline.engine.task import Samples, Task


class Run:
    """What the parts of a run share. `trunkline.engine.trainer.Trainer` is the run that puts it together."""

    task: Task
    config: RunConfig
    ranks: Ranks
    folder: Path
    dataset: Samples
    """What is trained on."""
    batches: GlobalBatches
    total_steps: int
    progress: Progress
    assembly: Assembly
    micro: MicroBatches
    checkpoints: Checkpoints
    trackers: Trackers
    watchdog: Watchdog
    lookout: Lookout

    @property
    def backend(self) -> Backend:
        """The model under training; another object after memory ran out."""
        return self.assembly.backend

    def is_due(self, every: int, step: int) -> bool:
        """Whether what is done every `every` steps is done after this one. After the last one everything is."""
        return step % every == 0 or step == self.total_steps

    def note(self, doing: str) -> None:
        """Tell the watchdog what all ranks do next."""
        self.watchdog.note(self.progress.step, doing)

    def begin(self, doing: str) -> None:
        """The same of work of unknown length."""
        self.watchdog.note(self.progress.step, doing, works=True)

    def say(self, line: str) -> None:
        """Say a line, on one rank."""
        if self.ranks.is_main:
            LOG.info(line)

    def warn(self, line: str) -> None:
        """The same of a warning."""
        if self.ranks.is_main:
            LOG.warning(line)

    def log(self, split: str, values: Mapping[str, float], facts: At | None = None) -> None:
        """Hand the values of the present step to the trackers, and to metrics.jsonl where the run is, and `facts`."""
        at = position(self.progress, self.task.unit, self.batches.per_epoch)
        self.trackers.log(self.progress.step, split, values, {**at, **(facts or {})})

    def save_weights(self, name: str, facts: dict[str, float]) -> str:
        """Write best/ or final/. Called on all ranks. Returns the SHA-256 of the weights."""
        self.begin(f"writing {name}/")
        with self.assembly.average.in_place("evaluation" if name == BEST else "final"):
            return save_weights(self.folder / name, self.backend, self.task, self.config, facts, self.ranks)

    @contextmanager
    def naming_a_lost_rank(self) -> Iterator[None]:
        """Within, the end of another rank is an error that says what to do."""
        try:
            yield
        except Exception as error:
            if not lost_a_rank(error):
                raise
            raise TrunklineError(
                f"another rank has ended, so this one stops, at step {self.progress.step}: {str(error).splitlines()[0]}"
                f"; look for the first error above, then {resume_with(self.folder)}"
            ) from error
