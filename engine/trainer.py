"""The training loop: the only one, for every workload and every backend.

Read `Trainer.__init__` for how a run is put together, then `Trainer._train` for what happens in it. Its verbs are
modules beside this one: a step is made by step.py, with room.py where memory runs out; validation.py evaluates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from trunkline.engine.assembly import Assembly
from trunkline.engine.checkpoint.assets import keep_assets
from trunkline.engine.checkpoint.best import FINAL, BestWeights
from trunkline.engine.checkpoint.checkpoints import Checkpoints
from trunkline.engine.checkpoint.other_programs import NewBest, start_from
from trunkline.engine.checkpoint.resume import LAYOUT, UNSAID, find_checkpoint, identity
from trunkline.engine.config.deepspeed_section import own_classes, parameter_dtype
from trunkline.engine.config.direction import with_direction
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.data.loading import training_loader
from trunkline.engine.data.store import verify_together
from trunkline.engine.machine import stopping
from trunkline.engine.machine.again import resume_with
from trunkline.engine.machine.files import write_json
from trunkline.engine.machine.hardware import peak_flops
from trunkline.engine.machine.log import bars_are_hidden
from trunkline.engine.machine.output import lasting_output
from trunkline.engine.memory.micro_batch import MicroBatches, memory_facts
from trunkline.engine.plan import planned_batches, sizes_of, total_steps
from trunkline.engine.plan_text import render_summary
from trunkline.engine.progress import Progress
from trunkline.engine.ranks.agreement import agree
from trunkline.engine.ranks.distributed import Ranks, lost_a_rank, on_main
from trunkline.engine.ranks.lookout import Lookout, StopRequested
from trunkline.engine.ranks.selftest import collective_self_test
from trunkline.engine.ranks.start_facts import class_version, leaves
from trunkline.engine.ranks.watchdog import Watchdog
from trunkline.engine.readiness import ready
from trunkline.engine.record.boards import require_boards
from trunkline.engine.record.meter import Meter, brief
from trunkline.engine.record.metrics_file import MEASURED_BEFORE, RESUMED
from trunkline.engine.record.run_folder import claim, in_use, release
from trunkline.engine.record.trackers import Trackers, make_trackers
from trunkline.engine.room import Room
from trunkline.engine.run import Run
from trunkline.engine.step import Stepper, StepResult
from trunkline.engine.task import Batch, Task, checked_task
from trunkline.engine.validation import Validation


class Trainer(Run):
    """One run of one task.

    Args:
        task: what is trained.
        config: the validated configuration.
        ranks: this process among all; see trunkline.engine.ranks.distributed.start.
        folder: the run's folder; created if needed.
        backend: which engine shards the model.
        resume: "none", "auto", or the path of a run or a checkpoint.
        accept_new_data: go on from a checkpoint although the data set has changed.
    """

    @lasting_output()
    def __init__(
        self,
        task: Task,
        config: RunConfig,
        ranks: Ranks,
        folder: Path,
        backend: str = "deepspeed",
        resume: str = "none",
        accept_new_data: bool = False,
    ) -> None:
        with config.naming_origins():
            config = with_direction(config, checked_task(task))
            require_boards(config.training.trackers)
        self.task, self.config, self.ranks, self.folder = task, config, ranks, folder
        agree(
            leaves(config.as_dict()) | {"--backend": backend, "--resume": resume, "--accept-new-data": accept_new_data}
        )
        claim(folder, ranks)
        self.progress, self.trackers = Progress(), Trackers()
        self.watchdog = Watchdog(folder / ".ranks", ranks, config.training.hang_timeout_s)
        try:
            with self.starting(), config.naming_origins():
                self._put_together(backend, resume, accept_new_data)
        except BaseException:
            release(folder)
            raise

    def _put_together(self, backend: str, resume: str, accept_new_data: bool) -> None:
        task, config, ranks, folder = self.task, self.config, self.ranks, self.folder
        settings = config.training
        if settings.deterministic:  # the call imports the compiler, which takes seconds
            torch.use_deterministic_algorithms(True)

        if ranks.world_size > 1:
            self.watchdog.note(0, "testing the collectives")
            collective_self_test(ranks.device, list(dict.fromkeys([torch.float32, parameter_dtype(config.deepspeed)])))
        sizes = sizes_of(task, config, ranks.world_size)
        self.begin("reading the data")
        self.dataset = task.dataset("train")
        self.begin("verifying the data")
        datasets = (self.dataset, task.dataset("val"))
        verify_together([array for data in datasets for array in getattr(data, "arrays", ())], ranks)
        self.batches = planned_batches(task, config, ranks.world_size, sizes)
        self.total_steps = total_steps(config, self.batches)
        config = config.in_steps(self.batches.per_epoch)
        self.config = config = ready(config, backend, self.total_steps, ranks.world_size, ranks.device)
        known = identity(task, config, backend, ranks.world_size, self.batches)
        agree(leaves(known) | class_version(type(task), *own_classes(config.deepspeed)))
        self.begin("looking for checkpoints")
        self.checkpoints = Checkpoints(folder / "checkpoints", ranks, settings.keep_last, settings.keep_best)
        self.checkpoints.open_for_writing()
        found = find_checkpoint(resume, self.checkpoints, known, self.total_steps, accept_new_data, type(config.model))
        if settings.start_from is not None:
            self.begin(f"reading {settings.start_from}")
            found, said = start_from(
                settings.start_from, found, task, config, self.checkpoints, known, self.total_steps, self.batches
            )
            self.say("\n".join(said))
        elif resume == "auto" and found is None:
            self.say(f"{folder} holds no checkpoint yet: starting at step 0")

        facts = memory_facts(config, {key: known[key] for key in known if key not in UNSAID}, ranks.device, sizes)
        self.micro = MicroBatches(folder, sizes, facts, ranks, task.micro_batch_multiple)
        self.assembly = Assembly(task, config, ranks, backend, self.total_steps, known, found, self.begin)
        self.assembly.build(self.micro.sizes)
        self.begin("loading the checkpoint" if found is not None else "writing the plan")
        self.progress = self.assembly.restore()
        self.progress.evaluation_due |= settings.eval_at_start and self.progress.never_judged
        if found is not None:
            self.checkpoints.set_aside_after(self.progress.step)
            other = "" if known[LAYOUT] == found.state[LAYOUT] else f", from {found.state[LAYOUT]} to {known[LAYOUT]}"
            self.say(f"resumed from {found.path} at step {self.progress.step}{other}")

        on_main(lambda: write_json(folder / "config.json", config.as_dict()), ranks, f"{folder}: cannot be used")
        on_main(lambda: write_json(folder / "plan.json", self.assembly.plan), ranks, f"{folder}: cannot be used")
        notes = [*task.notes(), *self.assembly.notes, *self.micro.notes]
        self.say("\n".join([render_summary(self.assembly.plan), *notes]))
        keep_assets(folder, task, config, ranks)
        best = BestWeights(folder, task, config, self.progress)
        for note in best.settle(found, ranks):
            self.say(f"note: {note}")
        on_main(self._open_trackers, ranks, f"{folder}: cannot keep metrics")
        if found is not None and self.progress.step < self.total_steps:
            otherwise = {MEASURED_BEFORE: best.changed} if best.changed else {}
            self.log(RESUMED, {}, self.assembly.resumed | otherwise)
        self._saved_step = self.progress.step if found and found.path.parent == self.checkpoints.folder else None
        self.lookout = Lookout(ranks)
        self.room = Room(self)
        self.stepper, self.validation = Stepper(self, self.room), Validation(self, self.room)
        self._without_line: StepResult | None = None

    def _open_trackers(self) -> None:
        self.trackers = make_trackers(
            self.config.training.trackers, self.folder, self.config.as_dict(), self.progress.step, True,
            self.progress.evaluation_due, self.task.tracking, self.batches.per_epoch,
        )  # fmt: skip

    @contextmanager
    def starting(self) -> Iterator[None]:
        """What all ranks do within, before `run`, is watched, and a rank that is lost meanwhile is an error."""
        with self.watchdog.starting(), self.naming_a_lost_rank():
            yield

    @lasting_output()
    def run(self) -> Progress:
        """Train to the last step, to an early stop or to a signal; leave best/ and final/ behind.

        Raises:
            InterruptedRunError: a signal came; a checkpoint of the last finished step is saved.
            TrunklineError: too many steps in a row had to be skipped, a checkpoint could not be written, or another
                rank has ended.
        """
        with stopping.deferred(), in_use(self.folder):
            self.watchdog.start()
            try:
                with self.naming_a_lost_rank(), self.config.naming_origins():
                    try:
                        self._train()
                    except StopRequested:
                        self._save_and_stop()
                    self.begin("waiting for the checkpoint to be written")
                    self.checkpoints.wait()
            except Exception as error:
                if not lost_a_rank(error.__cause__):
                    self.checkpoints.settle()
                raise
            finally:
                self.watchdog.stop()
                self.trackers.close()
        return self.progress

    def close(self) -> None:
        """Let go of the folder and of the model's memory, for a program that does more than this run."""
        release(self.folder)
        self.assembly.release()

    def _save_and_stop(self) -> NoReturn:
        step, why = self.progress.step, stopping.requested()
        if why is None:
            stopping.request(why := "a signal to another rank")
        self.begin("saving a checkpoint")
        if step not in (0, self._saved_step):
            self.save()
        self.checkpoints.wait()
        self._log_last()
        where = f"after step {step}, which is saved" if step else "before the first step"
        raise stopping.InterruptedRunError(f"by {why} {where}; {resume_with(self.folder)}")

    def _train(self) -> None:
        """The loop: read, step, log, evaluate, save."""
        progress, every = self.progress, self.config.training
        self.validation.try_out()
        best, found = self._best(), self.assembly.found
        on_main(lambda: best.settle(found, progress, every.start_from), self.ranks, f"{self.folder}: cannot be used")
        if progress.evaluation_due:  # a stop broke it off, or it is the one at the start
            self.validation.evaluate()
            if every.keep_best and progress.is_best:
                self.save()
        peak = peak_flops(self.ranks.device, parameter_dtype(self.config.deepspeed))
        meter = self._meter = Meter(self.ranks, self.task.unit, self.task.flops_per_sample(), peak)
        with self._bar() as bar:
            for micro_batches in self._micro_batches():
                made = self.stepper.make(micro_batches)
                if made is None:
                    meter.restart()
                    continue
                self._log(made, bar)
                over = progress.step == self.total_steps
                progress.evaluation_due = self.is_due(every.eval_every, progress.step)
                if made.stop:
                    raise StopRequested
                with meter.paused():
                    if progress.evaluation_due:
                        over |= self.validation.evaluate()
                    if over or self.is_due(every.save_every, progress.step) or (every.keep_best and progress.is_best):
                        self.save()
                if over:
                    break
                self.note("reading the next batch")
        self._log_last()
        self.save_weights(FINAL, {"step": progress.step})
        self.trackers.finish(progress.best_step)

    def _micro_batches(self) -> Iterator[list[Batch]]:
        """This rank's share of each step to come. A step that was not made is read again, with the sizes in force."""
        progress, settings = self.progress, self.config.training
        # a run that had stopped early is over, also when it is resumed
        while progress.step < self.total_steps and not progress.out_of_patience(settings.early_stopping):
            for micro_batches in training_loader(
                self.task, self.dataset, self.batches, self.micro.sizes, self.ranks.rank, first_step=progress.step,
                last_step=self.total_steps, num_workers=settings.num_workers,
                pin_memory=self.ranks.device.type == "cuda",
            ):  # fmt: skip
                step = progress.step
                yield micro_batches
                if progress.step == step:
                    break

    def _log(self, made: StepResult, bar: tqdm[Any]) -> None:
        self.progress.count(seconds=self._meter.add(made.samples, made.weight))
        self._without_line = None if made.is_logged else made
        if made.is_logged:
            bar.set_postfix_str(brief(self._log_step(made), self.task.unit), refresh=False)
        bar.update()

    def _log_step(self, made: StepResult) -> dict[str, float]:
        values = self.stepper.values(made) | self._meter.read()
        self.log("train", values)
        return values

    def _log_last(self) -> None:
        """Log the last step of a run that ends between two lines. The lines after a resume do not depend on it."""
        if self._without_line is not None:
            self._log_step(self._without_line)

    def save(self, in_background: bool | None = None) -> Path:
        """Write a checkpoint of the present step, in the background or not; as the configuration says unless given."""
        in_background = self.config.training.async_save if in_background is None else in_background
        self.begin("saving a checkpoint")
        self.checkpoints.wait()  # so that no two copies of the state are held at once
        self._saved_step = self.progress.step
        self.backend.prefetch()  # for the probe and the step after it, while the state is copied
        then = self._best().hand_over if self.progress.is_best and self.progress.best_metrics else lambda path: None
        self.stepper.keep_means()
        state = self.assembly.state(self.progress)
        return self.checkpoints.save(*state, self.assembly.probe.loss(), in_background, then)

    def _best(self) -> NewBest:
        """What the task is told of the best evaluation so far."""
        progress = self.progress
        return NewBest(
            self.task, self.folder, [name for name, _ in self.backend.module.named_parameters()],
            self.config.deepspeed, progress.best_metrics, progress.best_step, progress.step - progress.skipped_steps,
            self.batches.per_epoch, self.total_steps, progress.best_is_average,
        )  # fmt: skip

    def _bar(self) -> tqdm[Any]:
        return tqdm(
            total=self.total_steps, initial=self.progress.step, desc=f"train {self.config.workload}", unit="step",
            disable=not self.ranks.is_main or bars_are_hidden(), dynamic_ncols=True,
        )  # fmt: skip
