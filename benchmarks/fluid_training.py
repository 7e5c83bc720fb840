"""Training of the fluid surrogate, beside transformers' Trainer and a loop of Accelerate on the same module.

    run(arguments)    `python launchers/bench.py fluid_training [--config configs/fluid/demo.json]`

All train the configuration's network with its optimizer, in fp32 or in bf16 on a GPU, from the same weights on and on
windows of the same store. The others have AdamW fused, as the Trainer's default is, and noise of torch.randn. Each is a
process of its own. Turns of some steps alternate; the first step of a turn does not count. Nobody logs, evaluates,
saves or averages weights.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from trunkline.benchmarks.pairs import ratio_of
from trunkline.benchmarks.report import the_device
from trunkline.benchmarks.sides import Clock, Ours, Side, apart
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.data.randomness import seed_torch
from trunkline.engine.plan import sizes_of
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.launchers.api import load_config
from trunkline.models.fluid.device_tokens import spans
from trunkline.models.fluid.noise import over_spans
from trunkline.models.registry import make_task

OURS = "Trunkline"


def run(arguments: argparse.Namespace) -> int:
    """Measure and print. Returns 0."""
    ours, *others = measure(arguments.config, arguments.backend, arguments.stage, arguments.turns, arguments.steps)
    for side in (ours, *others):
        print(f"{side.name:<22} {statistics.median(side.seconds) / arguments.steps * 1e3:8.2f} ms a step")
    for side in others:
        ratio = ratio_of(ours.speeds, side.speeds)
        print(f"speed, {ours.name} / {side.name} {ratio.median:.3f} (95 %: {ratio.low:.3f} ... {ratio.high:.3f})")
    return 0


def measure(path: Path, backend: str, stage: int | None, turns: int, steps: int) -> list[Side]:
    """Ours, then the others; on a CPU by the process's own time."""
    config = _config(path, stage, turns * (steps + 1))
    makers = partial(_ours, backend), partial(_peer, _Trainer), partial(_peer, _Accelerate)
    return apart([partial(make, config, steps) for make in makers], turns)


@contextmanager
def _ours(backend: str, config: RunConfig, steps: int) -> Iterator[Ours]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(make_task(config), config, start(), Path(folder, "run"), backend)
        yield Ours(OURS, trainer, steps, lambda batch: int(batch["valid"].sum()))
        trainer.close()


def _peer(kind: type[_Peer], config: RunConfig, steps: int) -> AbstractContextManager[_Peer]:
    return nullcontext(kind(config, steps))


def _config(path: Path, stage: int | None, steps: int) -> RunConfig:
    never = steps + 1
    return load_config(
        path,
        {
            "training.epochs": None, "training.steps": steps, "training.eval_every": never, "training.ema": None,
            "training.save_every": never, "training.log_every": never, "training.trackers": [],
            "deepspeed.bf16.enabled": torch.cuda.is_available(),
        } | ({} if stage is None else {"deepspeed.zero_optimization.stage": stage}),
    )  # fmt: skip


class _WithNoise(nn.Module):
    """The network as one hands it to others: it adds the noise and returns the mean loss."""

    noise: Tensor

    def __init__(self, task: Any, seed: int) -> None:
        super().__init__()
        seed_torch(seed, 0)  # as the engine does
        self.network = task.build_model()
        task.initialize(self.network)
        self.num_boundary, self.minutes = task.schema.num_boundary, task.data.history
        self.register_buffer("noise", task.normalization.state_scale * task.model.input_noise)

    def forward(self, x: Tensor, target: Tensor, mask: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
        x = x.clone()
        seen = x[:, : self.minutes, self.num_boundary :]
        drift, alone = torch.randn(2, len(x), len(spans(self.minutes)), seen.shape[-1], device=x.device)
        seen += self.noise * over_spans(drift, alone, self.minutes)
        total, count = self.network(x, target, mask if weight is None else mask * weight[:, None, None])
        return {"loss": total / count}


class _Peer:
    """What both others have: the module, its optimizer and the windows that it trains on."""

    name: str

    def __init__(self, config: RunConfig, steps: int) -> None:
        self.steps, self.task, self.side = steps, make_task(config), Side(self.name)
        self.clock = Clock(self.side, the_device(), cpu_time=True)
        self.module = _WithNoise(self.task, config.training.seed)
        section = config.deepspeed
        self.batch_size, self.clip = sizes_of(self.task, config, 1).micro_batch_size, section.gradient_clipping
        params = section.optimizer.params | {"betas": tuple(section.optimizer.params.get("betas", (0.9, 0.999)))}
        self.optimizer = torch.optim.AdamW(self.module.parameters(), **(params | {"fused": True}))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)
        self.windows: Any = self.task.dataset("train")


class _Trainer(_Peer):
    """transformers' Trainer; each turn is a train() of its own."""

    name = "transformers Trainer"

    def __init__(self, config: RunConfig, steps: int) -> None:
        super().__init__(config, steps)
        from transformers import TrainerCallback, TrainingArguments

        self._folder = tempfile.TemporaryDirectory()
        self._arguments = TrainingArguments(
            output_dir=self._folder.name, max_steps=steps + 1, per_device_train_batch_size=self.batch_size,
            max_grad_norm=self.clip, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
            bf16=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(), remove_unused_columns=False,
        )  # fmt: skip
        side = self

        class TakeTime(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == 1:
                    side.clock.begin()
                elif state.global_step == steps + 1:
                    side.clock.end()

        self._take_time = TakeTime()

    def take_turn(self) -> None:
        from transformers import PrinterCallback
        from transformers import Trainer as TheirTrainer

        theirs = TheirTrainer(
            model=self.module, args=self._arguments, train_dataset=self.windows, data_collator=self.task.collate,
            callbacks=[self._take_time], optimizers=(self.optimizer, self.schedule),
        )  # fmt: skip
        theirs.remove_callback(PrinterCallback)
        theirs.train()
        self.side.units.append(self.steps * self.batch_size)


class _Accelerate(_Peer):
    """The loop of Accelerate's documentation, with clipping."""

    name = "Accelerate loop"

    def __init__(self, config: RunConfig, steps: int) -> None:
        super().__init__(config, steps)
        from accelerate import Accelerator

        cuda = torch.cuda.is_available()
        self._accelerator = Accelerator(cpu=not cuda, mixed_precision="bf16" if cuda else "no")
        loader = DataLoader(self.windows, self.batch_size, True, collate_fn=self.task.collate, drop_last=True)
        self._prepared = self._accelerator.prepare(self.module, self.optimizer, self.schedule, loader)
        self._batches = self._endless()

    def _endless(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield from self._prepared[3]

    def take_turn(self) -> None:
        module, optimizer, schedule, _ = self._prepared
        for step in range(self.steps + 1):
            if step == 1:
                self.clock.begin()
            loss = module(**next(self._batches))["loss"]
            self._accelerator.backward(loss)
            self._accelerator.clip_grad_norm_(module.parameters(), self.clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        self.clock.end()
        self.side.units.append(self.steps * self.batch_size)
