"""Those that the engine's training speed is compared with: they train transformers' own model.

    TransformersTrainer, PlainAccelerate   two peers, which take turns with the engine (trunkline.benchmarks.causal_lm)
    no_launcher()                          where they are to be made

Each has its defaults (the attention "sdpa") at their fastest: the fused AdamW, no cache of keys, no log, no evaluation,
no save.
"""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trunkline.benchmarks.sides import Clock, Side
from trunkline.engine.config.deepspeed_section import batch_sizes
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.data.loading import collate
from trunkline.engine.data.order import FILLER, GlobalBatches
from trunkline.engine.optim.parameter_rules import parameter_groups
from trunkline.engine.optim.schedules import learning_rates
from trunkline.engine.task import Batch
from trunkline.models.text.linear_loss import IGNORE


class Peer:
    """A side that trains transformers' own model, from the engine's weights on.

    Args:
        steps: those that count in a turn
        total_steps: of the whole run, for the schedule
    """

    name: str

    def __init__(
        self, task: Any, weights: dict[str, Tensor], config: RunConfig, device: torch.device, steps: int,
        total_steps: int, padding_mask: bool, cpu_time: bool,
    ) -> None:  # fmt: skip
        from transformers import AutoModelForCausalLM

        loader: Any = AutoModelForCausalLM
        self.model = loader.from_config(copy.deepcopy(task.hf_config), attn_implementation="sdpa", dtype=torch.float32)
        missing, unknown = self.model.load_state_dict(weights, strict=False)
        assert not unknown
        assert set(missing) <= set(self.model.all_tied_weights_keys), missing
        self.model.config.use_cache = False
        self.model.to(device)
        self.task, self.device, self.steps, self.padding_mask = task, device, steps, padding_mask
        self.dataset, section = task.dataset("train"), config.deepspeed
        sizes = batch_sizes(section, world_size=1)
        self.micro_batch_size, self.accumulate = sizes.micro_batch_size, sizes.grad_accum_steps
        self.clip = section.gradient_clipping
        self.batches = GlobalBatches(len(self.dataset), sizes.global_batch_size, config.training.seed)
        params = section.optimizer.params | {"betas": tuple(section.optimizer.params.get("betas", (0.9, 0.999)))}
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, config), **(params | {"fused": True}))
        rates = learning_rates(section.scheduler, params["lr"], total_steps, list(range(total_steps + 1)))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: rates[step] / params["lr"])
        self.side = Side(self.name)
        self.clock = Clock(self.side, device, cpu_time)

    def take_turn(self, first_step: int) -> None:
        """One step, and `steps` that count, over the batches from `first_step` on."""
        self.model.train()
        self.side.units.append(real_tokens(self.dataset, self.batches, first_step, self.steps))
        ahead = range(first_step, first_step + self.steps + 2)  # Accelerate reads a batch ahead
        places = np.concatenate([self.batches.samples(step) for step in ahead]).tolist()
        self.train(_InOrder(self.dataset, places))

    def train(self, samples: _InOrder) -> None:
        """steps + 1 steps over these samples, the clock begun after the first and ended after the last."""
        raise NotImplementedError

    def collate(self, samples: Sequence[tuple[Any, int]]) -> dict[str, Tensor]:
        """The engine's padded batch, by the names and in the manner of transformers."""
        return self.from_ours(
            collate(self.task, [sample for sample, _ in samples], draws([place for _, place in samples]))
        )

    def from_ours(self, batch: Batch) -> dict[str, Tensor]:
        """transformers shifts the labels itself; samples that only fill up carry none."""
        labels = torch.full_like(batch["targets"], IGNORE)
        labels[:, 1:] = batch["targets"][:, :-1]
        labels[~batch["valid"]] = IGNORE
        given = {"input_ids": batch["input_ids"], "labels": labels}
        if self.padding_mask:
            # 0 from the first position after the last of the document, where position_ids start from 0 again
            real = batch["position_ids"] > 0
            real[:, 0] = True
            given["attention_mask"] = real.long()
        return given

    @torch.no_grad()
    def loss(self, batch: Batch) -> float:
        """Nats a token."""
        self.model.eval()
        given = {name: value.to(self.device) for name, value in self.from_ours(batch).items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return float(self.model(**given).loss)


class _InOrder(Dataset[Any]):
    """(sample, its place) in a given order of places, FILLER standing for no sample."""

    def __init__(self, dataset: Dataset[Any], places: list[int]) -> None:
        self.dataset, self.places = dataset, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        place = self.places[index]
        return self.dataset[max(place, 0)], place


class TransformersTrainer(Peer):
    """transformers' Trainer; each turn is a train() of its own, with the model, optimizer and schedule of the last."""

    name = "transformers Trainer"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        from transformers import PrinterCallback, TrainerCallback, TrainingArguments
        from transformers import Trainer as TheirTrainer
        from transformers.utils import logging

        clock, last = self.clock, self.steps + 1

        class TakeTime(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == 1:
                    clock.begin()
                if state.global_step == last:
                    clock.end()

        self._folder = tempfile.TemporaryDirectory()  # it wants one, and writes nothing there
        cuda, verbosity = self.device.type == "cuda", logging.get_verbosity()
        logging.set_verbosity_error()  # it remarks on the process group, which is the engine's
        settings = TrainingArguments(
            output_dir=self._folder.name, max_steps=self.steps + 1, per_device_train_batch_size=self.micro_batch_size,
            gradient_accumulation_steps=self.accumulate, max_grad_norm=self.clip, bf16=cuda, use_cpu=not cuda,
            train_sampling_strategy="sequential", remove_unused_columns=False, report_to=[], disable_tqdm=True,
            logging_strategy="no", save_strategy="no", eval_strategy="no", dataloader_num_workers=0,
            dataloader_pin_memory=cuda, include_num_input_tokens_seen="no",
        )  # fmt: skip
        self.trainer: Any = TheirTrainer(
            model=self.model, args=settings, train_dataset=[0], data_collator=self.collate,
            optimizers=(self.optimizer, self.schedule), callbacks=[TakeTime()],
        )  # fmt: skip
        self.trainer.remove_callback(PrinterCallback)
        logging.set_verbosity(verbosity)

    def train(self, samples: _InOrder) -> None:
        self.trainer.train_dataset = samples
        self.trainer.train()


class PlainAccelerate(Peer):
    """The loop of Accelerate's documentation, with gradient accumulation and clipping."""

    name = "Accelerate loop"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        from accelerate import Accelerator

        cuda = self.device.type == "cuda"
        self.accelerator = Accelerator(
            cpu=not cuda, mixed_precision="bf16" if cuda else "no", gradient_accumulation_steps=self.accumulate
        )
        self.prepared = self.accelerator.prepare(self.model, self.optimizer, self.schedule)

    def train(self, samples: _InOrder) -> None:
        accelerator, (model, optimizer, scheduler) = self.accelerator, self.prepared
        dataloader = accelerator.prepare_data_loader(
            DataLoader(samples, self.micro_batch_size, collate_fn=self.collate, pin_memory=self.device.type == "cuda")
        )
        step = 0
        for batch in dataloader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), self.clip)
                    step += 1
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients and step == 1:
                self.clock.begin()
            if step == self.steps + 1:
                self.clock.end()
                break


def real_tokens(dataset: Any, batches: GlobalBatches, first_step: int, steps: int) -> int:
    """Real tokens of the steps of a turn that count, which come after `first_step`."""
    places = np.concatenate([batches.samples(first_step + 1 + step) for step in range(steps)])
    return int(dataset.lengths[places[places != FILLER]].sum())


@contextlib.contextmanager
def no_launcher() -> Iterator[None]:
    """Without the variables of a launcher, which would make Accelerate wrap its model for one of several ranks."""
    hidden = {name: os.environ.pop(name, None) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in hidden.items() if value is not None})


def draws(places: Sequence[int]) -> list[np.ndarray]:
    """For trunkline.engine.data.loading.collate, of a task in which nothing is drawn."""
    return [np.array(places, np.int64)] * 2
