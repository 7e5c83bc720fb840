"""The training problem: a model, samples and a loss. The engine does the rest."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from trunkline.engine.task import Batch, Sums, Task
from trunkline.launchers.skeleton.config import Data, Model
from trunkline.launchers.skeleton.data import read


class SkeletonTask(Task):
    """A regression. `trunkline.engine.task.Task` says what else a task can do."""

    unit = "points"

    def __init__(self, data: Data, model: Model) -> None:
        self.data, self.model = data, model

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, self.model.width), nn.Tanh(), nn.Linear(self.model.width, 1))

    def dataset(self, split: str) -> list[dict[str, Tensor]]:
        return read(self.data, split)

    def loss(self, model: nn.Module, batch: Batch) -> Sums:
        # sums, never means: the engine divides by the number of points in the global batch
        valid = batch["valid"][:, None]  # false where a sample only fills up a short batch
        error = (model(batch["x"]) - batch["y"]) * valid
        return {"loss": error.square().sum(), "mae": error.abs().sum().detach()}

    def direction(self, metric: str) -> Literal["min", "max"] | None:
        return "min" if metric == "mae" else None

    def fingerprint(self) -> str:
        return self.data.model_dump_json()  # made-up points depend on nothing else: for files, take a digest of them


def make_task(data: Data, model: Model) -> SkeletonTask:
    """What Trunkline looks for."""
    return SkeletonTask(data, model)
