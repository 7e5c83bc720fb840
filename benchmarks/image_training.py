"""Training of image classifiers, beside transformers' Trainer on the same network.

    run(arguments)    `python launchers/bench.py image_training`

All train a new network with torch's fused AdamW in fp32, or on a GPU in bf16 with ZeRO 1. A micro-batch is one group of
each BatchNorm. The Trainer and one of our sides read a folder of PNGs and decode in each step: the Trainer by Pillow in
a data set, as is usual. Our other side reads the prepared store of the same pictures. Each has --workers processes that
read ahead, and what these may have read before a turn does not count. Turns of some steps alternate. Nothing is
augmented, and nobody logs, evaluates or saves. The pictures are random and few: an epoch reads them again and again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from trunkline.benchmarks.causal_lm_peers import no_launcher
from trunkline.benchmarks.pairs import ratio_of
from trunkline.benchmarks.sides import Clock, Ours, Side, take_turns, write
from trunkline.engine.config.run_config import RunConfig, load_config
from trunkline.engine.ranks.distributed import world
from trunkline.engine.trainer import Trainer
from trunkline.models.image_classification.config import IMAGENET_MEAN, IMAGENET_STD
from trunkline.models.image_classification.conversion import prepare
from trunkline.models.image_classification.decode import Size
from trunkline.models.registry import config_sections, make_task

CLASSES, PICTURES = 10, 512
FOLDER, STORE, THEIRS = "Trunkline", "Trunkline, store", "transformers Trainer"


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write. Returns 0."""
    folder, store, theirs = measure(
        arguments.arch, arguments.img_size, arguments.micro_batch_size, arguments.turns, arguments.steps,
        arguments.backend, arguments.workers,
    )  # fmt: skip
    for side in (folder, store, theirs):
        print(f"{side.name:<22} {statistics.median(side.speeds):8.1f} images/s")
    for side in (folder, store):
        ratio = ratio_of(side.speeds, theirs.speeds)
        print(f"speed, {side.name} / Trainer {ratio.median:.3f} (95 %: {ratio.low:.3f} ... {ratio.high:.3f})")
    about = (
        f"{arguments.arch}, {arguments.img_size} pixels, micro-batch {arguments.micro_batch_size}, "
        f"{arguments.workers} loader processes a side"
    )
    write(arguments, [(folder, theirs), (store, theirs)], "images", about)
    return 0


def measure(
    arch: str, img_size: int, micro_batch_size: int, turns: int, steps: int, backend: str, workers: int
) -> list[Side]:  # fmt: skip
    """The engine from the folder and from the store, and the Trainer; on a CPU by the process's own time."""
    warm_up = 1 + 2 * workers  # batches that a DataLoader has read ahead at most
    with tempfile.TemporaryDirectory() as name, world() as ranks:
        folder = Path(name)
        _write_pictures(folder / "pictures", PICTURES, img_size)
        prepare(folder / "pictures", folder / "store", Size(img_size, None))
        ours = []
        for side, data in ((FOLDER, {"path": str(folder / "pictures")}), (STORE, {"store": str(folder / "store")})):
            config = _config(folder, data, arch, img_size, micro_batch_size, turns * (warm_up + steps), workers)
            trainer = Trainer(make_task(config), config, ranks, folder / side, backend)
            ours.append(Ours(side, trainer, steps, lambda batch: int(batch["valid"].sum()), warm_up))
        theirs = _Theirs(ours[0].trainer, steps, warm_up, workers, folder)
        return take_turns([*ours, theirs], turns)


def _config(
    folder: Path, data: dict[str, str], arch: str, img_size: int, micro_batch_size: int, steps: int, workers: int
) -> RunConfig:
    still = {"flip": 0, "rotate": 0, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
    never = steps + 1
    raw = {
        "workload": "image_classification",
        "data": {**data, "img_size": img_size, "augmentation": still},
        "model": {"arch": arch, "batch_norm_group": micro_batch_size},
        "training": {
            "steps": steps, "eval_every": never, "save_every": never, "log_every": never, "trackers": [],
            "num_workers": workers,
        },
        "deepspeed": {
            "train_batch_size": micro_batch_size,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.05, "fused": True}},
            "gradient_clipping": 1.0,
            "bf16": {"enabled": torch.cuda.is_available()},
            "zero_optimization": {"stage": int(torch.cuda.is_available())},
        },
    }  # fmt: skip
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


class _Pictures(Dataset[dict[str, Any]]):
    """`count` pictures, the files again and again, decoded and normalised one by one."""

    def __init__(self, paths: list[Path], count: int) -> None:
        self.paths, self.count = paths, count
        self.mean, self.std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index % len(self.paths)]
        with Image.open(path) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        return {
            "pixel_values": (pixels / 255 - self.mean) / self.std, "labels": int(path.parent.name)
        }  # fmt: skip


class _Theirs:
    """transformers' Trainer on transformers' own network, with the weights that the engine began with."""

    def __init__(self, trainer: Trainer, steps: int, warm_up: int, workers: int, folder: Path) -> None:
        from transformers import AutoModelForImageClassification, TrainerCallback, TrainingArguments

        loader: Any = AutoModelForImageClassification
        module: Any = trainer.backend.module
        self.model = loader.from_config(module.config, dtype=torch.float32)
        self.model.load_state_dict(dict(trainer.backend.full_state()))
        self.model.to(trainer.ranks.device)
        self.side = Side(THEIRS)
        count, total = trainer.micro.sizes.global_batch_size, warm_up + steps
        paths = sorted((folder / "pictures" / "train").glob("*/*.png"))
        self._pictures, self._units = _Pictures(paths, count * total), count * steps
        params = trainer.config.deepspeed.optimizer.params
        self._optimizer = torch.optim.AdamW(self.model.parameters(), **params)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: 1.0)
        with no_launcher():
            self._arguments = TrainingArguments(
                output_dir=str(folder / "theirs"), max_steps=total, per_device_train_batch_size=count,
                max_grad_norm=1.0, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
                bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
                dataloader_num_workers=workers,
            )  # fmt: skip
        clock = Clock(self.side, trainer.ranks.device, cpu_time=True)

        class TakeTime(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == warm_up:
                    clock.begin()
                elif state.global_step == total:
                    clock.end()

        self._clock = TakeTime()

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
        self.side.units.append(self._units)
