"""Validation of a run: metrics, best weights, early stopping."""

from __future__ import annotations

from pathlib import Path

from trunkline.engine.checkpoint.best import BEST
from trunkline.engine.config.strict import nearest
from trunkline.engine.errors import ConfigError
from trunkline.engine.evaluation import evaluate, evaluated
from trunkline.engine.memory.shortage import OutOfMemory
from trunkline.engine.record.boards import SHOWN
from trunkline.engine.record.metrics_file import check_names
from trunkline.engine.room import Room
from trunkline.engine.run import Run


class Validation:
    """Every method is called on all ranks."""

    def __init__(self, run: Run, room: Room) -> None:
        self.run, self.room = run, room

    def try_out(self) -> None:
        """Evaluate one sample: an evaluation that cannot work should fail now, not after hours."""
        self.run.note("evaluating")
        self._metrics(num_samples=1, show_in=None)

    def evaluate(self) -> bool:
        """Log the validation metrics and keep the best weights. True if it is time to stop early."""
        run, settings, progress = self.run, self.run.config.training, self.run.progress
        metrics = self._metrics(settings.eval_samples, run.folder / SHOWN)
        self.room.evaluation_fits = True
        run.log("val", metrics)
        run.trackers.keep(progress.step, run.folder / SHOWN)
        name = settings.best.metric
        better = progress.judge(metrics[name], settings.best, settings.early_stopping)
        if better:
            progress.best_metrics = dict(metrics)
            run.trackers.best(progress.step, metrics)
            progress.best_is_average = run.assembly.average.serves("evaluation")
            progress.best_weights = run.save_weights(BEST, {"step": progress.step, name: metrics[name]})
        progress.evaluation_due = False
        run.say(f"step {progress.step}: val {name} {metrics[name]:.6g}{' (best)' if better else ''}")
        over = progress.out_of_patience(settings.early_stopping)
        if over:
            run.say(
                f"stopped early: {progress.evaluations_without_gain} evaluations in a row without a gain; best {name} "
                f"{progress.best:.6g} at step {progress.best_step}"
            )
        return over

    def _metrics(self, num_samples: int | None, show_in: Path | None) -> dict[str, float]:
        run, best = self.run, self.run.config.training.best

        def before_batch() -> None:
            run.note("evaluating")
            run.lookout.look()

        try:
            with (
                run.assembly.average.in_place("evaluation"),
                self.room.attempt(self.room.evaluation_fits),
                evaluated(run.task, run.backend) as model,
            ):
                metrics = evaluate(
                    run.task, model, run.ranks, num_samples=num_samples,
                    micro_batch_size=run.micro.evaluation, num_workers=run.config.training.num_workers,
                    before_batch=before_batch, show_in=show_in,
                )  # fmt: skip
        except OutOfMemory as error:
            shortage = error.shortage
        else:
            check_names(metrics, f"{type(run.task).__name__}.summarize")
            if best.metric not in metrics:
                raise ConfigError(
                    f"training.best.metric: '{best.metric}' is not measured{nearest(best.metric, list(metrics))}"
                )
            if best.mode == "auto":
                raise ConfigError(
                    f"training.best.mode: whether a higher or a lower '{best.metric}' is better is not known: set it "
                    "to min or max"
                )
            return metrics
        self.room.make(run.micro.halve_evaluation, shortage)
        return self._metrics(num_samples, show_in)
