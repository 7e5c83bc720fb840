"""Free-running generation inside `evaluate`: ranks that decode different lengths end, with one process's texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tests.distributed import run_distributed_test
from tests.engine.tiny import TinyTask, tiny_config
from trunkline.engine.data.randomness import mix
from trunkline.engine.ranks.distributed import start
from trunkline.engine.task import Batch, Sums
from trunkline.engine.trainer import Trainer

LAYOUTS = [("deepspeed", 3), ("fsdp", 3)]
OTHERS = [("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("fsdp", 0), ("fsdp", 2)]
VOCAB, LONGEST, VALIDATED = 40, 12, 11


class Pairs(Dataset[Any]):
    """Sample i: a prompt of its own, and how many tokens its answer has: from 1 to LONGEST."""

    def __init__(self, first: int, count: int) -> None:
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, int | list[int]]:
        number = index + self.first
        return {
            "index": index,
            "prompt": [2 + mix(3, number, place) % (VOCAB - 2) for place in range(5)],
            "length": 1 + mix(5, number) % LONGEST,
        }


class ChatTask(TinyTask):
    """A T5 that learns to repeat its prompt, and answers in `evaluate` by transformers' own generate."""

    unit = "tokens"
    generates = True

    def build_model(self) -> nn.Module:
        from transformers import T5Config, T5ForConditionalGeneration

        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_heads=2,
                dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
            )
        )  # fmt: skip

    def dataset(self, split: str) -> Pairs:  # type: ignore[override]
        return {"train": Pairs(0, 40), "val": Pairs(10_000, VALIDATED)}[split]

    def collate(self, samples: Sequence[Any]) -> Batch:
        return {key: torch.tensor([sample[key] for sample in samples]) for key in ("index", "prompt", "length")}

    def weight(self, batch: Batch) -> Tensor:
        return batch["valid"].sum() * batch["prompt"].shape[1]

    def loss(self, model: nn.Module, batch: Batch) -> Sums:
        labels = torch.where(batch["valid"][:, None], batch["prompt"], -100)
        logits = model(input_ids=batch["prompt"], labels=batch["prompt"]).logits
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")}

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        longest = int(batch["length"].max())  # differs by rank
        made = model.generate(  # type: ignore[operator]
            batch["prompt"], max_new_tokens=longest, do_sample=False, no_repeat_ngram_size=1
        )
        texts = torch.zeros(VALIDATED, LONGEST, dtype=torch.int64)
        for index, length, tokens, valid in zip(
            batch["index"], batch["length"], made[:, 1:], batch["valid"], strict=True
        ):
            tokens = tokens[:length]
            texts[index, : len(tokens)] += tokens * valid
        return self.loss(model, batch) | {"weight": self.weight(batch), "texts": texts}

    def summarize(self, sums: Sums) -> dict[str, float]:
        tokens = {f"token {place}": float(token) for place, token in enumerate(sums["texts"].flatten())}
        return {"loss": float(sums["loss"] / sums["weight"])} | tokens


class SilentTask(ChatTask):
    """The same without a generated text."""

    generates = False

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        return self.loss(model, batch) | {
            "weight": self.weight(batch), "texts": torch.zeros(1, 1, dtype=torch.int64)
        }  # fmt: skip


def rows(folder: Path, split: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "split"} for row in lines if row["split"] == split]


def train(folder: Path, backend: str, stage: int, kind: type[ChatTask] = ChatTask, **section: Any) -> None:
    config = tiny_config(
        folder.parent / f"of {start().rank}", training={"steps": 4, "eval_every": 2},
        deepspeed={"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 4, **section},
    )  # fmt: skip
    Trainer(kind(config.data, config.model), config, start(), folder, backend=backend).run()


def train_everywhere(rank: int, world_size: int, folder: Path, layouts: list[tuple[str, int]]) -> None:
    for backend, stage in layouts:
        train(folder / f"{backend}{stage} on {world_size}", backend, stage)


def texts(folder: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key.startswith("token")} for row in rows(folder, "val")]


@pytest.mark.distributed
@pytest.mark.parametrize("layouts", [LAYOUTS, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=str)
def test_two_ranks_that_decode_different_lengths_make_the_texts_of_one_process(
    tmp_path: Path, layouts: list[tuple[str, int]]
) -> None:
    train(tmp_path / "alone", "deepspeed", 0)
    run_distributed_test(train_everywhere, 2, tmp_path, layouts, backend=None)
    alone = texts(tmp_path / "alone")
    assert len(alone) == 2
    assert len(set(alone[0].values())) > 5
    for backend, stage in layouts:
        assert texts(tmp_path / f"{backend}{stage} on 2") == alone, f"{backend} {stage}"


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "stage"), [("deepspeed", 3), ("fsdp", 3)])
def test_generating_leaves_training_as_it_is(tmp_path: Path, backend: str, stage: int) -> None:
    train(tmp_path / "generating", backend, stage)
    train(tmp_path / "silent", backend, stage, SilentTask)
    for key in ("loss", "grad_norm"):
        made, silent = ([row[key] for row in rows(tmp_path / name, "train")] for name in ("generating", "silent"))
        assert made == silent
    assert [row["loss"] for row in rows(tmp_path / "generating", "val")] == [
        row["loss"] for row in rows(tmp_path / "silent", "val")
    ]
