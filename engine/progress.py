"""What a run carries from step to step beside model, optimizer and schedule.

It is saved with every checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from trunkline.engine.config.run_config import Best, EarlyStopping

UNCOUNTED: dict[str, None] = {"samples_seen": None, "weight_seen": None, "seconds": None}
"""What a state says of steps that were not counted."""


@dataclass
class Progress:
    """How far a run is, and what its evaluations, skipped steps and gradients have been."""

    step: int = 0
    best: float | None = None
    best_step: int = 0
    best_metric: str = ""
    best_mode: str = ""
    best_weights: str = ""
    """Of what was judged so far: the metric and its direction, and the SHA-256 of the best one's model.safetensors."""
    best_is_average: bool = False
    """It is the weights' moving average that was judged best."""
    evaluations_without_gain: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    norm_average: float = 0.0
    norms_seen: int = 0
    averaged: int = 0
    """How often the weights' moving average has been updated."""
    since_line: dict[str, float] = field(default_factory=dict)
    """With training.log_means: the sums over the steps since the last line."""
    since_line_weight: float = 0.0
    best_metrics: dict[str, float] = field(default_factory=dict)
    """All that the best evaluation measured."""
    evaluation_due: bool = False
    """The evaluation of this step is still to be made, before the next step."""
    samples_seen: int | None = 0
    weight_seen: float | None = 0.0
    seconds: float | None = field(default=0.0, compare=False)
    """Of all steps so far, skipped ones too: samples, their weight, and the time of the steps alone. None where the
    run began in a version that did not count, or in another program."""

    def __post_init__(self) -> None:
        if "" in self.since_line:  # where earlier versions put the weight
            sums = dict(self.since_line)
            self.since_line_weight, self.since_line = sums.pop(""), sums

    def count(self, **more: float) -> None:
        """Add to the totals that `UNCOUNTED` names. One that is None, as the run did not begin with it, stays so."""
        for name, value in more.items():
            if (before := getattr(self, name)) is not None:
                setattr(self, name, before + value)

    def judge(self, value: float, best: Best, stopping: EarlyStopping | None) -> bool:
        """Take note of an evaluation's metric at the present step. True if it is the best so far."""
        sign = 1 if best.mode == "min" else -1
        self.best_metric, self.best_mode = best.metric, best.mode
        better = math.isfinite(value) and (self.best is None or sign * value < sign * self.best)
        gained = better and (
            self.best is None or sign * (self.best - value) >= (stopping.min_delta if stopping else 0.0)
        )
        self.evaluations_without_gain = 0 if gained else self.evaluations_without_gain + 1
        if better:
            self.best, self.best_step = value, self.step
        return better

    @property
    def never_judged(self) -> bool:
        """Whether nothing has happened yet: no step and no evaluation."""
        return self.step == 0 and not self.best_metric

    @property
    def is_best(self) -> bool:
        """Whether the best evaluation so far is that of the present step."""
        return self.best is not None and self.best_step == self.step

    def forget_best(self) -> None:
        """Judge anew: no evaluation has been made yet."""
        self.best, self.best_step, self.best_weights, self.evaluations_without_gain = None, 0, "", 0
        self.best_metrics = {}
        self.best_metric = self.best_mode = ""

    def out_of_patience(self, stopping: EarlyStopping | None) -> bool:
        """Whether it is time to stop early."""
        return stopping is not None and self.evaluations_without_gain >= stopping.patience
