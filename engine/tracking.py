"""What a task asks of the programs that show a run (TensorBoard, Weights & Biases, MLflow), as data.

metrics.jsonl is the engine's own record, and keeps steps and the engine's names whatever stands here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Tracking:
    """An attribute `tracking` of a task. Values are named "<split>/<name>" where nothing else is said."""

    names: Mapping[str, str | None] = field(default_factory=dict)
    """Other names, such as {"train/lr": "learning_rate", "val/loss": "valid_loss"}; None keeps a value away. What the
    best evaluation measured is "best/<name>", <name> being that of "val/..." here, and "best/epoch"."""
    axis: Literal["step", "epoch"] = "step"
    """What a value is shown over: optimizer steps, or the epoch of that step, counted from 0."""
    experiment: str | None = None
    """MLflow's experiment, Weights & Biases' project. Their environment variables win, and over them the
    configuration's training.tracked."""
    run: str | None = None
    """What the run is called there: the name of its folder if None."""
    final: Mapping[str, str] = field(default_factory=dict)
    """What of the best evaluation is shown once more when the run ends: {"accuracy": "evaluation/accuracy"}."""
    artifacts: tuple[str, ...] = ()
    """Files and folders in the run's folder that are handed over when the run ends: ("best", "assets/classes.json")."""

    def tag(self, split: str, name: str) -> str | None:
        """What a value of a split is called; None for one that is kept away."""
        if split == "best":
            name = self.names.get(f"val/{name}", name) or ""
        return self.names.get(f"{split}/{name}", f"{split}/{name}") if name else None

    def position(self, step: int, steps_per_epoch: int) -> int:
        """Where a value of this step (from 1) stands on the axis."""
        return step if self.axis == "step" else max(0, step - 1) // steps_per_epoch
