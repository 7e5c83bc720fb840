"""A small task with ragged samples, and a program that trains it: what the engine's tests run on.

Run as a script it is launched like launchers/train.py, by python or by deepspeed:

    python tests/engine/tiny.py OUTPUT_DIR CONFIG_JSON [--resume auto]
"""

from __future__ import annotations

if __name__ == "__main__":
    from trunkline.engine.machine.output import keep_printing
    from trunkline.engine.machine.stopping import EXIT_CODE, listen

    keep_printing()
    listen(EXIT_CODE, "with no step under way")

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from trunkline.engine.config.run_config import RunConfig, load_config
from trunkline.engine.config.strict import Strict
from trunkline.engine.data.randomness import mix, normal
from trunkline.engine.task import Batch, Sums, Task


class TinyData(Strict):
    samples: int = 40
    width: int = 6
    longest: int = 5
    noise: float = 0.0
    poison: tuple[int, ...] = ()
    """Samples whose targets are not a number."""


class TinyModel(Strict):
    hidden: int = 8
    layers: int = 2
    dropout: float = 0.0


class Rows(Dataset[Any]):
    """Sample i: a row of 1 to `longest` points of a fixed function; how many depends on i, so batches are ragged."""

    def __init__(self, data: TinyData, first: int, count: int) -> None:
        self.data, self.first, self.count = data, first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        number = index + self.first
        length = 1 + mix(7, number) % self.data.longest
        x = normal(torch.tensor([number]), (length, self.data.width))[0]
        y = torch.sin(x.sum(1, keepdim=True)) + 0.5 * x[:, :1]
        return x, y * float("nan") if index in self.data.poison else y


class Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(width, width), nn.LayerNorm(width), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.tanh(self.linear(self.norm(x))))


class Net(nn.Module):
    _no_split_modules: ClassVar[list[str]] = ["Block"]

    def __init__(self, width: int, model: TinyModel) -> None:
        super().__init__()
        self.enter = nn.Linear(width, model.hidden)
        self.blocks = nn.ModuleList(Block(model.hidden, model.dropout) for _ in range(model.layers))
        self.leave = nn.Linear(model.hidden, 1)
        self.register_buffer("offset", torch.tensor([0.125]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x.to(self.enter.weight.dtype))
        for block in self.blocks:
            x = block(x)
        return self.leave(x).float() + self.offset


class TinyTask(Task):
    """Sum of squared errors over the points of a row; the weight is the number of points."""

    unit = "points"

    def __init__(self, data: TinyData, model: TinyModel) -> None:
        self.data, self.model = data, model

    def build_model(self) -> nn.Module:
        return Net(self.data.width, self.model)

    def dataset(self, split: str) -> Rows:
        return {"train": Rows(self.data, 0, self.data.samples), "val": Rows(self.data, 10_000, 11)}[split]

    def collate(self, samples: Sequence[tuple[Tensor, Tensor]]) -> Batch:
        x = torch.zeros(len(samples), self.data.longest, self.data.width)
        y, mask = torch.zeros(len(samples), self.data.longest, 1), torch.zeros(len(samples), self.data.longest, 1)
        for row, (points, target) in enumerate(samples):
            x[row, : len(points)], y[row, : len(points)], mask[row, : len(points)] = points, target, 1.0
        return {"x": x, "y": y, "mask": mask}

    def weight(self, batch: Batch) -> Tensor:
        return self._mask(batch).sum()

    def loss(self, model: nn.Module, batch: Batch) -> Sums:
        x = batch["x"]
        if self.data.noise and model.training:
            x = x + self.data.noise * normal(batch["draw"], x.shape[1:])
        mask = self._mask(batch)
        error = torch.where(mask > 0, model(x) - batch["y"], 0.0)
        return {"loss": error.square().sum(), "absolute": error.abs().sum().detach()}

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        return self.loss(model, batch) | {"weight": self.weight(batch), "samples": batch["valid"].sum()}

    def summarize(self, sums: Sums) -> dict[str, float]:
        return {"loss": float(sums["loss"] / sums["weight"]), "samples": float(sums["samples"])}

    def flops_per_sample(self) -> float:
        return 6.0 * self.data.width * self.model.hidden

    def fingerprint(self) -> str:
        return hashlib.sha256(self.data.model_dump_json(exclude={"poison", "noise"}).encode()).hexdigest()

    def notes(self) -> list[str]:
        return ["tiny: nothing is left out"]

    def save_assets(self, folder: Path) -> dict[str, Any]:
        (folder / "note.txt").write_text("tiny")
        return {"model_type": "tiny"}

    def _mask(self, batch: Batch) -> Tensor:
        return batch["mask"] * batch["valid"][:, None, None]


def lay_over(raw: dict[str, Any], sections: dict[str, dict[str, Any]]) -> None:
    """Put the keys of `sections` over those of a configuration, and the keys of objects in them over theirs."""
    for name, section in sections.items():
        for key, value in section.items():
            inner = raw[name].get(key)
            raw[name][key] = inner | value if isinstance(inner, dict) and isinstance(value, dict) else value


def tiny_config(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """A run of the tiny task with these sections laid over the defaults, through the real loader."""
    raw: dict[str, Any] = {
        "workload": "tiny",
        "data": {},
        "model": {},
        "training": {"steps": 12, "eval_every": 5, "save_every": 4, "log_every": 1, "trackers": []},
        "deepspeed": {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.01}},
            "scheduler": {"type": "WarmupCosine", "params": {"warmup": 0.25}},
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 0},
        },
    }
    lay_over(raw, sections)
    raw["training"] = {key: value for key, value in raw["training"].items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.json"
    path.write_text(json.dumps(raw))
    return load_config(path, sections=lambda name: (TinyData, TinyModel))


def main() -> int:
    from trunkline.engine.errors import TrunklineError
    from trunkline.engine.machine.stopping import InterruptedRunError
    from trunkline.engine.ranks.distributed import start, stop
    from trunkline.engine.trainer import Trainer

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("config", type=Path)
    parser.add_argument("--resume", default="none")
    parser.add_argument("--local_rank", type=int)
    arguments = parser.parse_args()
    config = load_config(arguments.config, sections=lambda name: (TinyData, TinyModel))
    try:
        ranks = start(timeout_s=120)
        Trainer(TinyTask(config.data, config.model), config, ranks, arguments.folder, resume=arguments.resume).run()
    except InterruptedRunError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 75
    except TrunklineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
