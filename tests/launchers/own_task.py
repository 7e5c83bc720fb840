"""A user's own task, as small as one can be, and a configuration of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trunkline import Task, parse_config
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.task import Batch, Sums


class Line(Task):
    """y is the sum of x; the squared error of a linear layer."""

    def __init__(self, interrupt_at: int = 0) -> None:
        self.interrupt_at, self.batches = interrupt_at, 0

    def build_model(self) -> nn.Module:
        return nn.Linear(3, 1)

    def dataset(self, split: str) -> list[dict[str, Tensor]]:
        x = torch.randn(64, 3, generator=torch.Generator().manual_seed(len(split)))
        return [{"x": row, "y": row.sum()} for row in x]

    def collate(self, samples: Sequence[Any]) -> Batch:
        self.batches += 1
        if self.batches == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)  # what Ctrl-C and a notebook's stop button send
        return super().collate(samples)

    def loss(self, model: nn.Module, batch: Batch) -> Sums:
        return {"loss": ((model(batch["x"])[:, 0] - batch["y"]).square() * batch["valid"]).sum()}

    def fingerprint(self) -> str:
        return "line"


def line_config(**training: Any) -> RunConfig:
    values: Mapping[str, Any] = {
        "training": {"steps": 20, "eval_every": 10, "save_every": 10, "log_every": 1, "trackers": []} | training,
        "deepspeed": {"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}},
    }
    return parse_config(values)
