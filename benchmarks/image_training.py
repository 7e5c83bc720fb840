"""Training of image classifiers, beside transformers' Trainer on the same network.

    run(arguments)    `python launchers/bench.py image_training`

Both train a new network with torch's fused AdamW in fp32, or in bf16 on a GPU, from one folder of PNGs, which both
decode in each step: the Trainer by Pillow in a data set, as is usual. Turns of some steps alternate; the first step of
a turn does not count. Nothing is augmented, and neither side logs, evaluates or saves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from trunkline.benchmarks.causal_lm_peers import no_launcher
from trunkline.benchmarks.pairs import now, ratio_of
from trunkline.engine.config.run_config import RunConfig, load_config
from trunkline.engine.ranks.distributed import start
from trunkline.engine.task import Batch
from trunkline.engine.trainer import Trainer
from trunkline.models.image_classification.config import IMAGENET_MEAN, IMAGENET_STD
from trunkline.models.registry import config_sections, make_task

CLASSES = 10


def run(arguments: argparse.Namespace) -> int:
    """Measure and print. Returns 0."""
    ours, theirs = measure(
        arguments.arch, arguments.img_size, arguments.micro_batch_size, arguments.turns, arguments.steps,
        arguments.backend,
    )  # fmt: skip
    images = arguments.micro_batch_size * arguments.steps
    for name, seconds in (("Trunkline", ours), ("transformers Trainer", theirs)):
        print(f"{name:<22} {images / statistics.median(seconds):8.1f} images/s")
    ratio = ratio_of(theirs, ours)
    print(f"speed, Trunkline / Trainer {ratio.median:.3f} (95 %: {ratio.low:.3f} ... {ratio.high:.3f})")
    return 0


def measure(
    arch: str, img_size: int, micro_batch_size: int, turns: int, steps: int, backend: str
) -> tuple[list[float], list[float]]:  # fmt: skip
    """The seconds of each turn of both; on a CPU those of the process's own time."""
    with tempfile.TemporaryDirectory() as folder:
        count = micro_batch_size * (steps + 1)
        _write_pictures(Path(folder, "pictures"), count, img_size)
        config = _config(Path(folder), arch, img_size, micro_batch_size, turns * (steps + 1))
        trainer = Trainer(make_task(config), config, start(), Path(folder, "run"), backend)
        ours, theirs = _Ours(trainer, steps), _Theirs(trainer, steps, Path(folder))
        for turn in range(turns):
            for side in (ours, theirs) if turn % 2 else (theirs, ours):
                side.take_turn()
    return ours.seconds, theirs.seconds


def _config(folder: Path, arch: str, img_size: int, micro_batch_size: int, steps: int) -> RunConfig:
    still = {"flip": 0, "rotate": 0, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
    never = steps + 1
    raw = {
        "workload": "image_classification",
        "data": {"path": str(folder / "pictures"), "img_size": img_size, "augmentation": still},
        "model": {"arch": arch},
        "training": {"steps": steps, "eval_every": never, "save_every": never, "log_every": never, "trackers": []},
        "deepspeed": {
            "train_batch_size": micro_batch_size,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.05, "fused": True}},
            "gradient_clipping": 1.0,
            "bf16": {"enabled": torch.cuda.is_available()},
            "zero_optimization": {"stage": 0},
        },
    }
    (folder / "config.json").write_text(json.dumps(raw))
    return load_config(folder / "config.json", sections=config_sections)


def _write_pictures(root: Path, count: int, size: int) -> None:
    generator = np.random.default_rng(0)
    for split, images in (("train", count), ("val", CLASSES)):
        for number in range(images):
            place = root / split / str(number % CLASSES)
            place.mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{number}.png")


class _Ours:
    """The engine's own loop over its own batches."""

    def __init__(self, trainer: Trainer, steps: int) -> None:
        self.trainer, self.steps, self.seconds = trainer, steps, list[float]()
        self._batches: Iterator[list[Batch]] = trainer._micro_batches()

    def take_turn(self) -> None:
        for step in range(self.steps + 1):
            if step == 1:
                begin = now()
            assert self.trainer.stepper.make(next(self._batches)) is not None
        self.seconds.append(now() - begin)


class _Pictures(Dataset[dict[str, Any]]):
    """Decoded and normalised one by one."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.mean, self.std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        with Image.open(self.paths[index]) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        return {
            "pixel_values": (pixels / 255 - self.mean) / self.std, "labels": int(self.paths[index].parent.name)
        }  # fmt: skip


class _Theirs:
    """transformers' Trainer on transformers' own network, with the weights that the engine began with."""

    def __init__(self, trainer: Trainer, steps: int, folder: Path) -> None:
        from transformers import AutoModelForImageClassification, TrainerCallback, TrainingArguments

        loader: Any = AutoModelForImageClassification
        module: Any = trainer.backend.module
        self.model = loader.from_config(module.config, dtype=torch.float32)
        self.model.load_state_dict(dict(trainer.backend.full_state()))
        self.seconds = list[float]()
        count = trainer.micro.sizes.global_batch_size
        self._pictures = _Pictures(sorted((folder / "pictures" / "train").glob("*/*.png")))
        params = trainer.config.deepspeed.optimizer.params
        self._optimizer = torch.optim.AdamW(self.model.parameters(), **params)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: 1.0)
        with no_launcher():
            self._arguments = TrainingArguments(
                output_dir=str(folder / "theirs"), max_steps=steps + 1, per_device_train_batch_size=count,
                max_grad_norm=1.0, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
                bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
            )  # fmt: skip
        side = self

        class Clock(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == 1:
                    self.begin = now()
                elif state.global_step == steps + 1:
                    side.seconds.append(now() - self.begin)

        self._clock = Clock()

    def take_turn(self) -> None:
        from transformers import PrinterCallback
        from transformers import Trainer as TheirTrainer

        with no_launcher():
            theirs = TheirTrainer(
                model=self.model, args=self._arguments, train_dataset=self._pictures, callbacks=[self._clock],
                optimizers=(self._optimizer, self._schedule),
            )  # fmt: skip
            theirs.remove_callback(PrinterCallback)
            theirs.train()
