"""Training of encoder-decoders, beside transformers' Seq2SeqTrainer on the same network.

    run(arguments)    `python launchers/bench.py seq2seq_training`

All sides train a T5 of one preset with torch's fused AdamW in fp32, or on a GPU in bf16 with ZeRO 1, from the same
weights on: the engine with a sample a row, and with half as many packed rows; Seq2SeqTrainer with its defaults,
DataCollatorForSeq2Seq, the attention "sdpa" and batches in random order. Turns of some steps alternate; the first step
of a turn does not count. Tokens are real ones of prompts and responses: padding counts nowhere. Nobody logs, evaluates
or saves.

The data are made up: words at random, in lengths as chats have them, log-normal: prompts of 24 tokens in the median
(sigma 1.0), responses of 96 (sigma 0.9), cut at 256 each.
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
from torch.utils.data import Dataset

from trunkline.benchmarks.causal_lm_peers import no_launcher
from trunkline.benchmarks.pairs import ratio_of
from trunkline.benchmarks.sides import Clock, Ours, Side, take_turns, write
from trunkline.engine.config.run_config import RunConfig, load_config
from trunkline.engine.ranks.distributed import world
from trunkline.engine.task import Batch
from trunkline.engine.trainer import Trainer
from trunkline.models.registry import config_sections, make_task
from trunkline.models.seq2seq.prepare import prepare
from trunkline.models.text.linear_loss import IGNORE

THEIRS, PADDED, PACKED = "Seq2SeqTrainer", "Trunkline, padded", "Trunkline, packed"
LONGEST = 256
VOCABULARY, WORDS = 2000, 300  # so that each word is a token


def run(arguments: argparse.Namespace) -> int:
    """Measure, print and write. Returns 0."""
    sides, flops = measure(
        arguments.preset, arguments.micro_batch_size, arguments.turns, arguments.steps, arguments.backend
    )  # fmt: skip
    theirs, *ours = sides
    for side in sides:
        print(f"{side.name:<20} {statistics.median(side.speeds):10,.1f} tokens/s")
    for side in ours:
        ratio = ratio_of(side.speeds, theirs.speeds)
        print(f"speed, {side.name} / {THEIRS} {ratio.median:.3f} (95 %: {ratio.low:.3f} ... {ratio.high:.3f})")
    about = f"T5 {arguments.preset}, micro-batch {arguments.micro_batch_size}, or half as many packed rows"
    write(arguments, [(side, theirs) for side in ours], "tokens", about, flops)
    return 0


def measure(preset: str, micro_batch_size: int, turns: int, steps: int, backend: str) -> tuple[list[Side], float]:
    """Theirs and ours, on a CPU by the process's own time; useful FLOPs of a real token."""
    with tempfile.TemporaryDirectory() as name, world() as ranks:
        folder, total = Path(name), turns * (steps + 1)
        for seed, (split, count) in enumerate((("train", micro_batch_size * total), ("val", 16))):
            _write_chats(folder / f"{split}.jsonl", count, seed)
        prepare(
            [folder / "train.jsonl"], folder / "store", vocab_size=VOCABULARY, val_sources=[folder / "val.jsonl"]
        )  # fmt: skip
        ours = []
        for side, packing in ((PADDED, False), (PACKED, True)):
            config = _config(folder, preset, packing, micro_batch_size, total)
            trainer = Trainer(make_task(config), config, ranks, folder / side, backend)
            ours.append(Ours(side, trainer, steps, _real))
        padded: Any = ours[0].trainer.task
        pairs = padded.dataset("train")
        tokens = sum(len(pairs[place].input) + len(pairs[place].target) for place in range(len(pairs)))
        sides = take_turns([_Theirs(ours[0].trainer, steps, folder), *ours], turns)
        return sides, padded.flops_per_sample() * len(pairs) / tokens


def _write_chats(path: Path, count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    words = ["".join(generator.choice(list("abcdefghijklmnopqrstuvwxyz"), 5)) for _ in range(WORDS)]

    def text(median: float, sigma: float) -> str:
        length = int(np.clip(generator.lognormal(np.log(median), sigma), 1, LONGEST - 1))
        return " ".join(generator.choice(words, length))

    with path.open("w") as file:
        for _ in range(count):
            file.write(json.dumps({"prompt": text(24, 1.0), "response": text(96, 0.9)}) + "\n")


def _config(folder: Path, preset: str, packing: bool, micro_batch_size: int, steps: int) -> RunConfig:
    never = steps + 1
    batch = max(1, micro_batch_size // 2) if packing else micro_batch_size
    raw = {
        "workload": "seq2seq",
        "data": {
            "store": str(folder / "store"), "max_source_length": LONGEST, "max_target_length": LONGEST,
            "packing": packing,
        },
        "model": {"preset": preset, "vocab_size": VOCABULARY, "generation": {"samples": 0}},
        "training": {"steps": steps, "eval_every": never, "save_every": never, "log_every": never, "trackers": []},
        "deepspeed": {
            "train_batch_size": batch,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.01, "fused": True}},
            "gradient_clipping": 1.0,
            "bf16": {"enabled": torch.cuda.is_available()},
            "zero_optimization": {"stage": int(torch.cuda.is_available())},
        },
    }  # fmt: skip
    path = folder / f"{'packed' if packing else 'padded'}.json"
    path.write_text(json.dumps(raw))
    return load_config(path, sections=config_sections)


def _real(batch: Batch) -> int:
    return int(((batch["input_document"] >= 0).sum(1) + (batch["targets"] != IGNORE).sum(1))[batch["valid"]].sum())


class _Samples(Dataset[dict[str, Any]]):
    def __init__(self, pairs: Any) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        return {"input_ids": pair.input.tolist(), "labels": pair.target.tolist()}


class _Theirs:
    """transformers' Seq2SeqTrainer on transformers' own network, with the weights that the engine began with."""

    def __init__(self, trainer: Trainer, steps: int, folder: Path) -> None:
        from transformers import (
            AutoModelForSeq2SeqLM,
            DataCollatorForSeq2Seq,
            Seq2SeqTrainingArguments,
            TrainerCallback,
        )

        task: Any = trainer.task
        loader: Any = AutoModelForSeq2SeqLM
        self.model = loader.from_config(task.hf_config, dtype=torch.float32)
        tensors = {str(task.tensor_name(name)): tensor for name, tensor in trainer.backend.full_state()}
        missing, unknown = self.model.load_state_dict(tensors, strict=False)
        assert not unknown
        assert set(missing) <= set(self.model.all_tied_weights_keys), missing
        self.model.to(trainer.ranks.device)
        self.side = Side(THEIRS)
        self._samples, self._turn = _Samples(task.dataset("train")), 0
        params = trainer.config.deepspeed.optimizer.params
        self._optimizer = torch.optim.AdamW(self.model.parameters(), **params)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: 1.0)
        self._collator = DataCollatorForSeq2Seq(task.tokenizer, self.model, pad_to_multiple_of=8)
        self._tokens = 0
        with no_launcher():
            self._arguments = Seq2SeqTrainingArguments(
                output_dir=str(folder / "theirs"), max_steps=steps + 1, max_grad_norm=1.0, report_to=[],
                per_device_train_batch_size=trainer.micro.sizes.global_batch_size, save_strategy="no",
                logging_strategy="no", disable_tqdm=True, bf16=torch.cuda.is_available(),
                use_cpu=not torch.cuda.is_available(), remove_unused_columns=False,
            )  # fmt: skip
        side, clock = self, Clock(self.side, trainer.ranks.device, cpu_time=True)

        class TakeTime(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == 1:
                    side._tokens = 0
                    clock.begin()
                elif state.global_step == steps + 1:
                    clock.end()
                    side.side.units.append(side._tokens)

        self._clock = TakeTime()

    def take_turn(self) -> None:
        from transformers import PrinterCallback, Seq2SeqTrainer

        self._turn += 1
        self._arguments.seed = self._arguments.data_seed = self._turn  # by which it shuffles
        with no_launcher():
            theirs = Seq2SeqTrainer(
                model=self.model, args=self._arguments, train_dataset=self._samples, callbacks=[self._clock],
                data_collator=self._collate, optimizers=(self._optimizer, self._schedule),
            )  # fmt: skip
            theirs.remove_callback(PrinterCallback)
            theirs.train()

    def _collate(self, samples: list[dict[str, Any]]) -> Any:
        self._tokens += sum(len(sample["input_ids"]) + len(sample["labels"]) for sample in samples)
        return self._collator(samples)
