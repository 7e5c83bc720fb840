"""One optimizer step: the gradient of a global batch, and the update.

    made = stepper.make(micro_batches)    a StepResult, or None where memory ran out
    stepper.values(made)                  what is logged of it

The gradient is d(sum of losses over the global batch) / (sum of weights over the global batch), on any number of ranks
and in any number of micro-batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from trunkline.engine.data.order import lengths_of
from trunkline.engine.data.randomness import mix, seed_torch
from trunkline.engine.errors import TrunklineError
from trunkline.engine.evaluation import to_device
from trunkline.engine.machine import stopping
from trunkline.engine.memory.shortage import OutOfMemory
from trunkline.engine.optim import nonfinite
from trunkline.engine.optim.clipping import clip_norm, note_norm
from trunkline.engine.ranks.distributed import sum_over_ranks
from trunkline.engine.record.metrics_file import check_names
from trunkline.engine.room import Room
from trunkline.engine.run import Run
from trunkline.engine.task import Batch, Sums, add_sums


class Accumulated(NamedTuple):
    """The gradient is there. On how many ranks a signal came and a save failed: `flags`, fp64 [2] on the device."""

    parts: list[Sums]
    weight: Tensor
    flags: Tensor


@dataclass(frozen=True)
class StepResult:
    """A step that was made, the same on all ranks but for `parts`.

    parts: this rank's sums, to be added up; of all steps since the last line with training.log_means.
    samples, weight: of the global batch, without fillers.
    summed_weight: what the sums are divided by.
    learning_rate: the step's.
    grad_norm: before clipping, a scalar on the device or a float.
    is_logged: it has a line by training.log_every.
    stop: a rank was asked to stop.
    """

    parts: list[Sums]
    samples: int
    weight: float
    summed_weight: Tensor
    learning_rate: float
    grad_norm: Tensor | float
    is_logged: bool
    stop: bool


class Stepper:
    """Every method is called on all ranks."""

    def __init__(self, run: Run, room: Room) -> None:
        self.run, self.room = run, room
        self._lengths = lengths_of(run.dataset)
        self._since = self._remembered()
        self._draws = mix(run.config.training.seed, 1, run.ranks.rank)
        self._flags = {
            (stop, failed): torch.tensor([stop, failed], dtype=torch.float64, device=run.ranks.device)
            for stop in (False, True)
            for failed in (False, True)
        }

    def make(self, micro_batches: list[Batch]) -> StepResult | None:
        """The next step; None if memory ran out, and everything is ready to make it with smaller micro-batches.

        Raises TrunklineError if too many steps in a row had to be skipped, or a checkpoint could not be written.
        """
        run, progress, updating = self.run, self.run.progress, False
        adaptive, fixed = run.config.training.adaptive_clipping, run.config.deepspeed.gradient_clipping
        is_logged = run.is_due(run.config.training.log_every, progress.step + 1)
        rate, scale = run.backend.learning_rate(), run.backend.loss_scale()
        longest = run.batches.heaviest(progress.step, self._lengths)
        fits = longest <= self.room.longest_step
        try:
            with self.room.attempt(fits):
                parts, weight, flags = self.accumulate(micro_batches)
            updating = True
            if adaptive is not None:
                run.backend.clip_at(clip_norm(adaptive, fixed, progress))
            with self.room.attempt(fits):
                run.note("optimizer step")
                stepped = run.backend.step()
        except OutOfMemory as error:
            shortage = error.shortage
        else:
            self.room.longest_step = max(longest, self.room.longest_step)
            stop, save_failed = flags.tolist()  # not sooner: a GPU's queue is drained here
            samples, whole_weight = run.batches.count(progress.step), float(weight)
            progress.count(samples_seen=samples, weight_seen=whole_weight)
            progress.step += 1
            if save_failed:
                run.checkpoints.wait()  # raises it, on all ranks in the same step
            if stepped.skipped:
                self._skipped(micro_batches, scale)
            else:
                progress.skipped_in_a_row = 0
                run.assembly.applied(progress)
                if adaptive is not None:
                    note_norm(adaptive, fixed, progress, float(stepped.grad_norm))
            if run.config.training.log_means:
                parts, weight = self._since_line(parts, weight, is_logged, stepped.skipped)
            return StepResult(parts, samples, whole_weight, weight, rate, stepped.grad_norm, is_logged, bool(stop))
        micro_batches.clear()
        run.assembly.statistics.put_back()
        self.room.make(run.micro.halve, shortage, intact=not updating)
        return None

    def _since_line(
        self, parts: list[Sums], weight: Tensor, is_logged: bool, skipped: bool
    ) -> tuple[list[Sums], Tensor]:
        """Of all steps since the last line. A step that was skipped is in no mean, but where there is no other."""
        sums = _total(parts)
        if self._since is not None:
            before, before_weight = self._since
            sums, weight = self._since if skipped else (add_sums(before, sums), before_weight + weight)
        if is_logged:
            self._since = None
        elif not skipped:
            self._since = sums, weight
        return [sums], weight

    def keep_means(self) -> None:
        """Put what the next line is made of into the progress, for a checkpoint."""
        progress, since = self.run.progress, self._since
        if since is None:
            progress.since_line, progress.since_line_weight = {}, 0.0
        else:
            total = sum_over_ranks(since[0], self.run.ranks)
            progress.since_line = {name: float(value) for name, value in total.items()}
            progress.since_line_weight = float(since[1])
        self._since = self._remembered()

    def _remembered(self) -> tuple[Sums, Tensor] | None:
        """Sums and global weight of the steps since the last line; those of all ranks are on the first one."""
        ranks = self.run.ranks
        progress = self.run.progress
        if not (self.run.config.training.log_means and progress.since_line):
            return None
        mine = {name: value if ranks.is_main else 0.0 for name, value in progress.since_line.items()}
        *sums, weight = torch.tensor([*mine.values(), progress.since_line_weight], dtype=torch.float64).to(ranks.device)
        return dict(zip(mine, sums, strict=True)), weight

    def accumulate(self, micro_batches: list[Batch]) -> Accumulated:
        """Gradients of (sum of losses over the global batch) / (sum of weights over the global batch)."""
        run = self.run
        # what torch draws in a step (dropout) depends on nothing but this, so no generator has to be saved
        seed_torch(self._draws, run.progress.step)
        statistics = run.assembly.statistics
        micro_batches[:] = [to_device(batch, run.ranks.device) for batch in statistics.begin(micro_batches)]
        run.note("all-reduce of the batch's weight")
        weights = [run.task.weight(batch).to(torch.float64) for batch in micro_batches]
        mine = {
            "weight": torch.stack(weights).sum() if weights[1:] else weights[0],
            "flags": self._flags[stopping.requested() is not None, run.checkpoints.failed],
        }
        agreed = sum_over_ranks(mine, run.ranks)
        # fp32 from here on: an fp64 scale would lift the loss, and a weight beyond 2^24 is rounded, which is harmless
        scale = agreed["weight"].clamp(min=1e-30).reciprocal().to(torch.float32)
        parts = []
        for number, batch in enumerate(micro_batches, 1):
            run.lookout.look()  # a step that is broken off is made again from its beginning
            run.note("forward, backward and reduction of the gradients")
            part = run.task.loss(run.backend.model, batch)
            statistics.take(batch["valid"])
            loss = part["loss"].detach()
            # loss - loss is 0, but NaN where the loss is not finite: then no gradient is, and the step is skipped
            run.backend.backward(part["loss"] * (scale + (loss - loss)), is_last=number == len(micro_batches))
            statistics.put_back()
            parts.append({name: value.detach() for name, value in part.items()})
        return Accumulated(parts, agreed["weight"], agreed["flags"])

    def values(self, made: StepResult) -> dict[str, float]:
        """What is logged of a step: the means of its sums, the rate and the norm."""
        sums = _total(made.parts)
        check_names(sums, f"{type(self.run.task).__name__}.loss")
        total = sum_over_ranks(sums, self.run.ranks)
        weight = made.summed_weight
        means = {key: float(value / weight) if weight else math.nan for key, value in total.items()}
        return means | {"lr": made.learning_rate, "grad_norm": float(made.grad_norm)}

    def _skipped(self, micro_batches: list[Batch], scale_before: float) -> None:
        run, progress, limit = self.run, self.run.progress, self.run.config.training.nonfinite_limit
        scale = run.backend.loss_scale()
        progress.skipped_steps += 1
        # halvings are how fp16 finds its loss scale, and end at the lowest: there, the steps count
        progress.skipped_in_a_row += scale >= scale_before
        if scale > 1:
            lowest = scale <= run.config.deepspeed.fp16.min_loss_scale
            where = f"the fp16 loss scale is now {scale:g}{', deepspeed.fp16.min_loss_scale' if lowest else ''}"
        else:
            seed_torch(self._draws, progress.step - 1)
            with run.backend.gathered() as model:
                where = nonfinite.locate(run.task, model, micro_batches, run.ranks)
            run.assembly.statistics.put_back()
        line = (
            f"step {progress.step} skipped, its gradient is not finite ({where}); {progress.skipped_in_a_row} in a row"
        )
        run.warn(f"{line}, {progress.skipped_steps} in all")
        run.log("skipped", {"skipped_steps": progress.skipped_steps})
        if progress.skipped_in_a_row >= limit:
            raise TrunklineError(
                f"{line}: stopped (training.nonfinite_limit = {limit}); lower deepspeed.optimizer.params.lr, set "
                f"deepspeed.gradient_clipping, or look at the data named above"
            )


def _total(parts: list[Sums]) -> Sums:
    sums = None
    for part in parts:
        sums = add_sums(sums, part)
    assert sums is not None
    return sums
