"""Fifty steps against transformers' Seq2SeqTrainer: the same batches, optimizer and schedule, whole and frozen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.seq2seq.families import write_folder
from tests.models.seq2seq.toy_pairs import SILENT, toy_config
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.data.order import FILLER, GlobalBatches
from trunkline.engine.optim.schedules import learning_rates
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.models.registry import make_task
from trunkline.models.text.linear_loss import IGNORE

FROZEN = [{"names": ["lm.shared.*", "lm.encoder.*"], "frozen": True}]


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"]


def losses_of_seq2seq_trainer(config: RunConfig, folder: Path, frozen: bool) -> list[float]:
    """The same run by transformers' Seq2SeqTrainer: its model, its loss, its loop and its clipping."""
    from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainer, Seq2SeqTrainingArguments

    task: Any = make_task(config)
    loader: Any = AutoModelForSeq2SeqLM
    model = loader.from_pretrained(config.model.path, attn_implementation="eager", dropout_rate=0.0)
    if frozen:
        model.shared.requires_grad_(False)
        model.encoder.requires_grad_(False)
    steps, section = config.training.steps or 0, config.deepspeed
    size, dataset = section.train_batch_size or 0, task.dataset("train")
    batches = GlobalBatches(len(dataset), size, config.training.seed)
    order = np.concatenate([batches.samples(step) for step in range(steps)])
    recorded: list[float] = []

    class InOrder(Seq2SeqTrainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

        def training_step(self, *arguments: Any, **keys: Any) -> torch.Tensor:
            loss = super().training_step(*arguments, **keys)
            recorded.append(float(loss))
            return loss

    def collate(places: list[int]) -> dict[str, torch.Tensor]:
        batch = task.collate([dataset[max(place, 0)] for place in places])
        labels = batch["targets"].clone()
        labels[torch.tensor(places) == FILLER] = IGNORE
        return {
            "input_ids": batch["input_ids"], "attention_mask": (batch["input_document"] >= 0).long(), "labels": labels
        }  # fmt: skip

    params = section.optimizer.params
    names = Seq2SeqTrainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]  # it uses no self
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name in names].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}],
        lr=params["lr"], weight_decay=params["weight_decay"],
    )  # fmt: skip
    rates = learning_rates(section.scheduler, params["lr"], steps, list(range(steps + 1)))
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=size, report_to=[], use_cpu=True,
        max_grad_norm=section.gradient_clipping, remove_unused_columns=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    InOrder(
        model=model, args=arguments, train_dataset=order.tolist(), data_collator=collate,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[step] / params["lr"])),
    ).train()  # fmt: skip
    return recorded


@pytest.mark.parametrize(
    ("family", "frozen"), [("t5", False), ("t5", True), pytest.param("flan", False, marks=pytest.mark.slow)]
)
def test_fifty_steps_have_the_losses_of_transformers_seq2seq_trainer(
    family: str, frozen: bool, pairs: Path, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "model", family, pairs / "tokenizer")
    config = toy_config(
        tmp_path, pairs, model=SILENT | {"path": str(folder)}, deepspeed={"train_micro_batch_size_per_gpu": 4},
        training={"steps": 50, "eval_every": 50, "save_every": 50, "parameters": FROZEN if frozen else []},
    )  # fmt: skip
    Trainer(make_task(config), config, start(), tmp_path / "run").run()
    expected = losses_of_seq2seq_trainer(config, tmp_path / "theirs", frozen)
    assert len(expected) == 50
    assert losses(tmp_path / "run") == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < 0.9 * expected[0]
