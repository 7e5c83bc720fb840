"""The training loop: the only one, for every workload and every backend.

Read `Trainer.__init__` for how a run is put together and `Trainer.run` for what happens in it, in that order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from trunkline.engine.assembly import Assembly
from trunkline.engine.backends import Backend, Stepped
from trunkline.engine.checkpoint.assets import keep_assets
from trunkline.engine.checkpoint.best import BEST, FINAL, BestWeights
from trunkline.engine.checkpoint.checkpoints import Checkpoints
from trunkline.engine.checkpoint.resume import LAYOUT, find_checkpoint, identity
from trunkline.engine.checkpoint.weights import save_weights
from trunkline.engine.config.deepspeed_section import batch_sizes, parameter_dtype
from trunkline.engine.config.direction import with_direction
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.config.strict import nearest
from trunkline.engine.data.loading import training_loader
from trunkline.engine.data.order import GlobalBatches
from trunkline.engine.data.randomness import mix, seed_torch
from trunkline.engine.data.store import verify_together
from trunkline.engine.errors import ConfigError, TrunklineError
from trunkline.engine.evaluation import evaluate, to_device
from trunkline.engine.machine import stopping
from trunkline.engine.machine.files import write_json
from trunkline.engine.machine.hardware import peak_flops
from trunkline.engine.machine.output import lasting_output
from trunkline.engine.memory.micro_batch import MicroBatches, memory_facts
from trunkline.engine.memory.shortage import Attempts, OutOfMemory, Shortage
from trunkline.engine.optim import nonfinite
from trunkline.engine.optim.clipping import clip_norm, note_norm
from trunkline.engine.plan import render_summary, total_steps
from trunkline.engine.progress import Progress
from trunkline.engine.ranks.agreement import agree
from trunkline.engine.ranks.distributed import Ranks, lost_a_rank, on_main, sum_over_ranks
from trunkline.engine.ranks.lookout import Lookout, StopRequested
from trunkline.engine.ranks.selftest import collective_self_test
from trunkline.engine.ranks.start_facts import class_version, leaves
from trunkline.engine.ranks.watchdog import Watchdog
from trunkline.engine.readiness import ready
from trunkline.engine.record.meter import Meter, brief
from trunkline.engine.record.run_folder import claim, in_use, release
from trunkline.engine.record.trackers import Trackers, make_trackers, require_trackers
from trunkline.engine.task import Batch, Sums, Task, add_sums

Accumulated = tuple[Sums | None, Tensor, Tensor]
"""A rank's sums if wanted, the global weight, and on how many ranks a signal came and a save failed."""


class InterruptedRunError(TrunklineError):
    """The run was asked to stop; what it had done is saved."""


class Trainer:
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
        config = with_direction(config, task)
        self.task, self.config, self.ranks, self.folder = task, config, ranks, folder
        require_trackers(config.training.trackers)
        agree(
            leaves(config.as_dict()) | {"--backend": backend, "--resume": resume, "--accept-new-data": accept_new_data}
        )
        claim(folder, ranks)
        self.progress, self.trackers = Progress(), Trackers()
        self.watchdog = Watchdog(folder / ".ranks", ranks, config.training.hang_timeout_s)
        try:
            with self.starting():
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
        sizes = batch_sizes(config.deepspeed, ranks.world_size)
        self._begin("reading the data")
        datasets = task.datasets()
        self.dataset = datasets["train"]
        self._begin("verifying the data")
        verify_together([array for data in datasets.values() for array in getattr(data, "arrays", ())], ranks)
        self.batches = GlobalBatches(len(self.dataset), sizes.global_batch_size, settings.seed)  # type: ignore[arg-type]
        self._lengths = getattr(self.dataset, "lengths", None)
        self.total_steps = total_steps(config, self.batches)
        self.config = config = ready(config, backend, self.total_steps, ranks.world_size, ranks.device)
        known = identity(task, config, backend, ranks.world_size, self.batches)
        agree(leaves(known) | class_version(task))
        self._begin("looking for checkpoints")
        self.checkpoints = Checkpoints(folder / "checkpoints", ranks, settings.keep_last, settings.keep_best)
        self.checkpoints.open_for_writing()
        found = find_checkpoint(resume, self.checkpoints, known, self.total_steps, accept_new_data, type(config.model))
        if resume == "auto" and found is None:
            self._say(f"{folder} holds no checkpoint yet: starting at step 0")

        self.attempts = Attempts(ranks)
        self.micro = MicroBatches(folder, sizes, memory_facts(config, known, ranks.device, sizes), ranks)
        self._heaviest_fit, self._evaluation_fits = -1, False  # nothing is known before the first of each
        self.assembly = Assembly(task, config, ranks, backend, self.total_steps, known, found, self._begin)
        self.assembly.build(self.micro.sizes)
        self._begin("loading the checkpoint" if found is not None else "writing the plan")
        self.progress = self.assembly.take_up()
        if found is not None:
            self.checkpoints.set_aside_after(self.progress.step)
            other = "" if known[LAYOUT] == found.state[LAYOUT] else f", from {found.state[LAYOUT]} to {known[LAYOUT]}"
            self._say(f"resumed from {found.path} at step {self.progress.step}{other}")

        on_main(lambda: write_json(folder / "config.json", config.as_dict()), ranks, f"{folder}: cannot be used")
        on_main(lambda: write_json(folder / "plan.json", self.assembly.plan), ranks, f"{folder}: cannot be used")
        self._say("\n".join([render_summary(self.assembly.plan), *task.notes(), *self.micro.notes]))
        keep_assets(folder, task, config, ranks)
        for note in BestWeights(folder, task, settings.best, self.progress).settle(found, ranks):
            self._say(f"note: {note}")
        on_main(self._open_trackers, ranks, f"{folder}: cannot keep metrics")
        self._saved_step = self.progress.step if found and found.path.parent == self.checkpoints.folder else None
        self._lookout = Lookout(ranks)
        self._draws = mix(settings.seed, 1, ranks.rank)
        self._flags = {
            (stop, failed): torch.tensor([stop, failed], dtype=torch.float64, device=ranks.device)
            for stop in (False, True)
            for failed in (False, True)
        }

    def _open_trackers(self) -> None:
        progress, config = self.progress, self.config
        self.trackers = make_trackers(
            config.training.trackers, self.folder, config.as_dict(), progress.step, True, progress.evaluation_due
        )

    @contextmanager
    def starting(self) -> Iterator[None]:
        """What all ranks do within, before `run`, is watched, and a rank that is lost meanwhile is an error."""
        with self.watchdog.starting(), self._naming_a_lost_rank():
            yield

    def _begin(self, doing: str) -> None:
        self.watchdog.note(self.progress.step, doing, works=True)

    @contextmanager
    def _naming_a_lost_rank(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not lost_a_rank(error):
                raise
            raise TrunklineError(
                f"another rank has ended, so this one stops, at step {self.progress.step}: {str(error).splitlines()[0]}"
                f"; look for the first error above, then go on with --resume auto --output-dir {self.folder}"
            ) from error

    @property
    def backend(self) -> Backend:
        """The model under training; another object after memory ran out."""
        return self.assembly.backend

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
                with self._naming_a_lost_rank():
                    self._train()
                    self.watchdog.note(self.progress.step, "waiting for the checkpoint to be written", works=True)
                    self.checkpoints.wait()
            except Exception as error:
                if not lost_a_rank(error.__cause__):
                    self.checkpoints.settle()
                raise
            finally:
                self.watchdog.stop()
                self.trackers.close()
        return self.progress

    def _train(self) -> None:
        try:
            self._make_steps()
        except StopRequested:
            self._save_and_stop()

    def _save_and_stop(self) -> NoReturn:
        step, why = self.progress.step, stopping.requested()
        if why is None:
            stopping.request(why := "a signal to another rank")
        self.watchdog.note(step, "saving a checkpoint", works=True)
        if step not in (0, self._saved_step):
            self.save()
        self.checkpoints.wait()
        where = f"after step {step}, which is saved" if step else "before the first step"
        raise InterruptedRunError(f"by {why} {where}; go on with --resume auto --output-dir {self.folder}")

    def _make_steps(self) -> None:
        settings, progress = self.config.training, self.progress
        self.watchdog.note(progress.step, "evaluating")
        self._metrics(num_samples=1)  # an evaluation that cannot work should fail now, not after hours
        if progress.evaluation_due:  # a stop broke it off
            self._evaluate()
        peak = peak_flops(self.ranks.device, parameter_dtype(self.config.deepspeed))
        unit, flops = self.task.unit, self.task.flops_per_sample()
        meter = Meter(self.micro.sizes, self.ranks.device, progress.step, unit, flops, peak)
        with self._bar() as bar:
            # a run that had stopped early is over, also when it is resumed
            for micro_batches in self._micro_batches() if not progress.out_of_patience(settings.early_stopping) else ():
                logged = (progress.step + 1) % settings.log_every == 0 or progress.step + 1 == self.total_steps
                lr, scale = self.backend.learning_rate() if logged else math.nan, self.backend.loss_scale()
                made = self._step(micro_batches, with_sums=logged)
                if made is None:  # memory ran out: the loader begins again at this step, with smaller micro-batches
                    meter.restart(progress.step)
                    continue
                (sums, weight, flags), stepped = made
                progress.step += 1
                meter.add(weight)
                stop, save_failed = flags.tolist()  # not sooner: a GPU's queue is drained here
                if save_failed:
                    self.checkpoints.wait()  # raises it, on all ranks in the same step

                if stepped.skipped:
                    self._skipped(micro_batches, scale)
                else:
                    progress.skipped_in_a_row = 0
                    if settings.adaptive_clipping is not None:
                        fixed = self.config.deepspeed.gradient_clipping
                        note_norm(settings.adaptive_clipping, fixed, progress, float(stepped.grad_norm))
                if sums is not None:
                    values = self._means(sums, weight) | {"lr": lr, "grad_norm": float(stepped.grad_norm)}
                    values |= meter.read(progress.step)
                    self.trackers.log(progress.step, "train", values)
                    bar.set_postfix_str(brief(values, unit), refresh=False)
                bar.update()

                finished = progress.step == self.total_steps
                progress.evaluation_due = progress.step % settings.eval_every == 0 or finished
                if stop:
                    raise StopRequested
                with meter.paused():
                    if progress.evaluation_due:
                        finished |= self._evaluate()
                    if progress.step % settings.save_every == 0 or finished:
                        self.watchdog.note(progress.step, "saving a checkpoint", works=True)
                        self.save()
                if finished:
                    break
                self.watchdog.note(progress.step, "reading the next batch")
        self._save_weights(FINAL, {"step": progress.step})

    def _micro_batches(self) -> Iterator[list[Batch]]:
        while self.progress.step < self.total_steps:
            sizes = self.micro.sizes
            for micro_batches in training_loader(
                self.task, self.dataset, self.batches, sizes, self.ranks.rank, first_step=self.progress.step,
                last_step=self.total_steps, num_workers=self.config.training.num_workers,
                pin_memory=self.ranks.device.type == "cuda",
            ):  # fmt: skip
                yield micro_batches
                if self.micro.sizes is not sizes:
                    break

    def _step(self, micro_batches: list[Batch], with_sums: bool) -> tuple[Accumulated, Stepped] | None:
        """One optimizer step; None if memory ran out, and everything is ready to make it with smaller micro-batches."""
        updating = False
        heaviest = self.batches.heaviest(self.progress.step, self._lengths)
        fits = heaviest <= self._heaviest_fit
        try:
            with self.attempt(fits):
                accumulated = self.accumulate(micro_batches, with_sums)
            updating = True
            if (adaptive := self.config.training.adaptive_clipping) is not None:
                self.backend.clip_at(clip_norm(adaptive, self.config.deepspeed.gradient_clipping, self.progress))
            with self.attempt(fits):
                self.watchdog.note(self.progress.step, "optimizer step")
                stepped = self.backend.step()
            self._heaviest_fit = max(heaviest, self._heaviest_fit)
            return accumulated, stepped
        except OutOfMemory as error:
            shortage = error.shortage
        micro_batches.clear()
        self._make_room(self.micro.halve, shortage, intact=not updating)
        return None

    def attempt(self, fits: bool = False) -> AbstractContextManager[None]:
        """What is done within raises OutOfMemory, on all ranks alike unless it is known to fit."""
        if not fits:
            self._begin("waiting for the checkpoint to be written")
            self.checkpoints.wait()  # its thread uses a process group
        return self.attempts.attempt(agreed=not fits)

    def accumulate(self, micro_batches: list[Batch], with_sums: bool) -> Accumulated:
        """Gradients of (sum of losses over the global batch) / (sum of weights over the global batch)."""
        # what torch draws in a step (dropout) depends on nothing but this, so no generator has to be saved
        seed_torch(self._draws, self.progress.step)
        micro_batches[:] = [to_device(batch, self.ranks.device) for batch in micro_batches]
        self.watchdog.note(self.progress.step, "all-reduce of the batch's weight")
        weights = [self.task.weight(batch).to(torch.float64) for batch in micro_batches]
        mine = {
            "weight": torch.stack(weights).sum() if weights[1:] else weights[0],
            "flags": self._flags[stopping.requested() is not None, self.checkpoints.failed],
        }
        agreed = sum_over_ranks(mine, self.ranks)
        # fp32 from here on: an fp64 scale would lift the loss, and a weight beyond 2^24 is rounded, which is harmless
        scale = agreed["weight"].clamp(min=1e-30).reciprocal().to(torch.float32)
        sums: Sums | None = None
        for batch in micro_batches:
            self._lookout.look()  # a step that is broken off is made again from its beginning
            self.watchdog.note(self.progress.step, "forward, backward and reduction of the gradients")
            part = self.task.loss(self.backend.model, batch)
            loss = part["loss"].detach()
            # loss - loss is 0, but NaN where the loss is not finite: then no gradient is, and the step is skipped
            self.backend.backward(part["loss"] * (scale + (loss - loss)))
            if with_sums:
                sums = add_sums(sums, part)
        return sums, agreed["weight"], agreed["flags"]

    def _means(self, sums: Sums, weight: Tensor) -> dict[str, float]:
        total = sum_over_ranks(sums, self.ranks)
        return {key: float(value / weight) if weight else math.nan for key, value in total.items()}

    def _skipped(self, micro_batches: list[Batch], scale_before: float) -> None:
        progress, limit = self.progress, self.config.training.nonfinite_limit
        scale = self.backend.loss_scale()
        progress.skipped_steps += 1
        # halvings are how fp16 finds its loss scale, and end at the lowest: there, the steps count
        progress.skipped_in_a_row += scale >= scale_before
        if scale > 1:
            lowest = scale <= self.config.deepspeed.fp16.min_loss_scale
            where = f"the fp16 loss scale is now {scale:g}{', deepspeed.fp16.min_loss_scale' if lowest else ''}"
        else:
            seed_torch(self._draws, progress.step - 1)
            with self.backend.gathered() as model:
                where = nonfinite.locate(self.task, model, micro_batches, self.ranks)
        line = (
            f"step {progress.step} skipped, its gradient is not finite ({where}); {progress.skipped_in_a_row} in a row"
        )
        self._say(f"warning: {line}, {progress.skipped_steps} in all")
        self.trackers.log(progress.step, "skipped", {"skipped_steps": progress.skipped_steps})
        if progress.skipped_in_a_row >= limit:
            raise TrunklineError(
                f"{line}: stopped (training.nonfinite_limit = {limit}); lower deepspeed.optimizer.params.lr, set "
                f"deepspeed.gradient_clipping, or look at the data named above"
            )

    def _evaluate(self) -> bool:
        """Log the validation metrics and keep the best weights. True if it is time to stop early."""
        settings, progress = self.config.training, self.progress
        metrics = self._metrics(settings.eval_samples)
        self._evaluation_fits = True
        self.trackers.log(progress.step, "val", metrics)
        name = settings.best.metric
        better = progress.judge(metrics[name], settings.best, settings.early_stopping)
        if better:
            progress.best_weights = self._save_weights(BEST, {"step": progress.step, name: metrics[name]})
        progress.evaluation_due = False
        self._say(f"step {progress.step}: val {name} {metrics[name]:.6g}{' (best)' if better else ''}")
        over = progress.out_of_patience(settings.early_stopping)
        if over:
            self._say(
                f"stopped early: {progress.evaluations_without_gain} evaluations in a row without a gain; best {name} "
                f"{progress.best:.6g} at step {progress.best_step}"
            )
        return over

    def _metrics(self, num_samples: int | None) -> dict[str, float]:
        def before_batch() -> None:
            self.watchdog.note(self.progress.step, "evaluating")
            self._lookout.look()

        try:
            with self.attempt(self._evaluation_fits):
                metrics = evaluate(
                    self.task, self.backend.model, self.ranks, num_samples=num_samples,
                    micro_batch_size=self.micro.evaluation, num_workers=self.config.training.num_workers,
                    before_batch=before_batch,
                )  # fmt: skip
        except OutOfMemory as error:
            shortage = error.shortage
        else:
            name = self.config.training.best.metric
            if name not in metrics:
                raise ConfigError(f"training.best.metric: '{name}' is not measured{nearest(name, list(metrics))}")
            if self.config.training.best.mode == "auto":
                raise ConfigError(
                    f"training.best.mode: whether a higher or a lower '{name}' is better is not known: set it to min "
                    "or max"
                )
            return metrics
        self._make_room(self.micro.halve_evaluation, shortage)
        return self._metrics(num_samples)

    def _make_room(
        self, halve: Callable[[int, Shortage, dict[str, Any]], str], shortage: Shortage, intact: bool = True
    ) -> None:
        """Go on with a smaller micro-batch, or say how to. `intact`: no parameter has changed since the last step."""
        step = self.progress.step
        line = halve(step, shortage, self.assembly.plan)
        if not shortage.agreed or not (intact or step == self.assembly.first_step):
            why = "the optimizer was changing the parameters" if shortage.agreed else "the other ranks are in the step"
            raise TrunklineError(
                f"{line}; {why}, so the run ends here; --resume auto --output-dir {self.folder} goes on with that"
            )
        self._say(f"warning: {line}")
        self.rebuild()
        self.note_sizes()

    def note_sizes(self) -> None:
        """Put the batch sizes in force, which are not the configured ones, into the run's plan and metrics."""
        path = self.folder / "plan.json"
        self.trackers.log(self.progress.step, "memory", self.micro.values())
        on_main(lambda: write_json(path, self.assembly.plan), self.ranks, f"{path}: cannot be written")

    def rebuild(self) -> None:
        """Put the run together again for the batch sizes in force. Called on all ranks."""
        self._begin("rebuilding the model for other micro-batches")
        self.assembly.rebuild(self.micro.sizes, self.progress, self.checkpoints)
        self._heaviest_fit, self._evaluation_fits = -1, False

    def save(self, in_background: bool | None = None) -> Path:
        """Write a checkpoint of the present step, in the background or not; as the configuration says unless given."""
        in_background = self.config.training.async_save if in_background is None else in_background
        self.checkpoints.wait()  # so that no two copies of the state are held at once
        self._saved_step = self.progress.step
        self.backend.prefetch()  # for the probe and the step after it, while the state is copied
        return self.checkpoints.save(*self.assembly.state(self.progress), self.assembly.probe.loss(), in_background)

    def _save_weights(self, name: str, facts: dict[str, float]) -> str:
        self.watchdog.note(self.progress.step, f"writing {name}/", works=True)
        return save_weights(self.folder / name, self.backend, self.task, self.config, facts, self.ranks)

    def _bar(self) -> tqdm[Any]:
        return tqdm(
            total=self.total_steps, initial=self.progress.step, desc=f"train {self.config.workload}", unit="step",
            disable=not self.ranks.is_main, dynamic_ncols=True,
        )  # fmt: skip

    def _say(self, line: str) -> None:
        if self.ranks.is_main:
            tqdm.write(line)
