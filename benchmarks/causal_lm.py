"""Training speed of language models against transformers' Trainer and Accelerate.

    run(arguments)   `python launchers/bench.py causal_lm [--backend fsdp]`
    measure(config, turns=..., steps=...)   tokens and seconds of every turn, and the losses

All sides start from the same weights and take the same micro-batches in the same order, with the same AdamW, schedule,
clipping, accumulation, precision (fp32 on a CPU, bf16 on a GPU) and threads, in one process and one after another: a
turn is a step that does not count and then a few that do, each from reading its batch to being wholly done. The engine
is its Trainer, whole, with its log of every tenth step. The others have their defaults (the attention "sdpa") at their
fastest: the fused AdamW, no cache of keys, no log, no evaluation, no save, and no attention mask, since causal
attention over rows that are padded on the right needs none; with --padding-mask they get the one that tokenizers and
collators make.

Packed batches are measured in a second run, in which the others keep their padded ones. Tokens are real ones: padding
counts nowhere. A turn's speeds make one ratio, so both of it are of the same moment of the same machine.

The engine is slower, and the exit status 1, where the whole 95 % interval of the median ratio lies below 1.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trunkline.benchmarks.causal_lm_peers import (
    Peer,
    PlainAccelerate,
    TransformersTrainer,
    draws,
    no_launcher,
    real_tokens,
)
from trunkline.benchmarks.pairs import ratio_of
from trunkline.benchmarks.sides import Clock, Side, write
from trunkline.engine.config.run_config import RunConfig, load_config
from trunkline.engine.data.loading import collate
from trunkline.engine.errors import ConfigError, TrunklineError
from trunkline.engine.ranks.distributed import Ranks, start, stop
from trunkline.engine.task import Batch
from trunkline.engine.trainer import Trainer
from trunkline.models.causal_lm.config import PRESETS, LlamaShape
from trunkline.models.causal_lm.examples import write_examples
from trunkline.models.causal_lm.flags import DEFAULT_VOCAB_SIZE
from trunkline.models.causal_lm.prepare import prepare
from trunkline.models.causal_lm.rendering import Rendered
from trunkline.models.causal_lm.store_writer import StoreWriter
from trunkline.models.causal_lm.task import KIND_OF
from trunkline.models.registry import config_sections, make_task
from trunkline.models.text.byte_tokenizer import plain_bytes
from trunkline.models.text.splits import Split

SAME_LOSS = {"cpu": 1e-5, "cuda": 1e-2}
"""Largest relative difference of the losses before training, in fp32 and in bf16."""
SAME_LOSS_TRAINED = 0.02
"""And after it, where all sides learned from the same batches."""
_CHECKED = 8  # documents
SMALLEST_GPT2 = LlamaShape(32_000, 768, 12, 12, 12, 2048)
"""109 million parameters."""


class _Engine(Trainer):
    """Trainer that lets the others have their turn after each of its own."""

    side: Side
    others: list[Peer]
    steps: int
    clock: Clock
    note_losses: Callable[[bool], None]

    def _micro_batches(self) -> Iterator[list[Batch]]:
        for step, micro_batches in enumerate(super()._micro_batches()):
            yield micro_batches  # the trainer comes back for the next when this step is wholly done
            place = step % (self.steps + 1)
            if place == 0:
                self.clock.begin()
            if place == self.steps:
                self.clock.end()
                first = step - self.steps
                self.side.units.append(real_tokens(self.dataset, self.batches, first, self.steps))
                turn = first // (self.steps + 1) % len(self.others)
                for peer in self.others[turn:] + self.others[:turn]:  # none always follows the same one
                    peer.take_turn(first)
                if step + 2 == self.total_steps:
                    self.note_losses(True)


def measure(
    config: RunConfig,
    *,
    turns: int,
    steps: int,
    backend: str = "deepspeed",
    padding_mask: bool = False,
    cpu_time: bool = False,
) -> list[Side]:
    """The engine's side and those of the peers, after `turns` turns of each.

    `config` trains for `total_steps(turns, steps)`; see `make_config`. Call it on one process.

    Raises TrunklineError if the sides do not have the same loss of the same documents, before or after.
    """
    ranks, total = start(), total_steps(turns, steps)
    assert config.training.steps == total
    task: Any = make_task(config)
    with_padding = replace(config, data=config.data.model_copy(update={"packing": False}))
    padded: Any = make_task(with_padding) if config.data.packing else task
    with tempfile.TemporaryDirectory() as folder, _quiet():
        engine = _Engine(task, config, ranks, Path(folder, "run"), backend=backend)
        names = ((task.tensor_name(name), value) for name, value in engine.backend.full_state())
        weights = {name: value for name, value in names if name is not None}
        with no_launcher():
            engine.others = [
                peer(padded, weights, config, ranks.device, steps, total, padding_mask, cpu_time)
                for peer in (TransformersTrainer, PlainAccelerate)
            ]
        engine.steps, engine.side = steps, Side("Trunkline, packed" if config.data.packing else "Trunkline")
        engine.clock = Clock(engine.side, ranks.device, cpu_time)
        sides = [engine.side, *(peer.side for peer in engine.others)]
        ours, theirs = _documents(task, padded)

        def note_losses(trained: bool) -> None:
            losses = [_loss(engine, ours, ranks), *(peer.loss(theirs) for peer in engine.others)]
            for side, loss in zip(sides, losses, strict=True):
                setattr(side, "loss_after" if trained else "loss_before", loss)

        note_losses(False)
        check_same(sides, "before", SAME_LOSS[ranks.device.type])
        engine.note_losses = note_losses
        engine.run()
        # packed rows are other batches
        check_same(sides[1:] if config.data.packing else sides, "after", SAME_LOSS_TRAINED)
    return sides


def total_steps(turns: int, steps: int) -> int:
    """With one that ends the last turn."""
    return turns * (steps + 1) + 1


def _documents(task: Any, padded: Any) -> tuple[Batch, Batch]:
    """The same documents as the engine's batch and as a padded one."""
    dataset, count = task.dataset("train"), min(_CHECKED, len(task.dataset("train")))
    if task is not padded:
        rows = [dataset[place] for place in range(min(2, count))]
        pieces = [piece for row in rows for piece in row]
        return collate(task, rows, draws(range(len(rows)))), collate(padded, pieces, draws(range(len(pieces))))
    batch = collate(task, [dataset[place] for place in range(count)], draws(range(count)))
    return batch, batch


@torch.no_grad()
def _loss(engine: Trainer, batch: Batch, ranks: Ranks) -> float:
    """The engine's loss in nats a token, computed as in a step."""
    batch = {name: value.to(ranks.device) for name, value in batch.items()}
    engine.backend.model.train()
    return float(engine.task.loss(engine.backend.model, batch)["loss"] / engine.task.weight(batch))


def check_same(sides: list[Side], when: str, limit: float) -> None:
    """Raises TrunklineError if the losses `when` ("before" or "after") training differ by more than a share `limit`."""
    losses = {side.name: getattr(side, f"loss_{when}") for side in sides}
    least, most = min(losses.values()), max(losses.values())
    if not (np.isfinite(list(losses.values())).all() and most - least <= limit * least):
        found = ", ".join(f"{name} {loss:.7f}" for name, loss in losses.items())
        raise TrunklineError(f"the losses of the same documents differ {when} training, so no speed counts: {found}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The engine's lines and progress bar are made, for nobody to read."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def make_config(
    raw: dict[str, Any], folder: Path, store: Path, *, steps: int, batch_size: int, accumulate: int, max_length: int,
    packing: bool, stage: int | None = None, cuda: bool = False,
) -> RunConfig:  # fmt: skip
    """The run that is measured: `raw`'s model, optimizer, schedule and clipping."""
    raw = copy.deepcopy(raw)
    raw["data"] = {**raw["data"], "store": str(store), "max_length": max_length, "packing": packing}
    raw["training"] = {
        **{name: raw.get("training", {}).get(name) for name in ("seed", "log_every", "best")},
        "steps": steps, "eval_every": steps, "eval_samples": 1, "save_every": steps, "trackers": [],
    }  # fmt: skip
    raw["training"] = {name: value for name, value in raw["training"].items() if value is not None}
    section = raw["deepspeed"]
    section["train_batch_size"], section["train_micro_batch_size_per_gpu"] = batch_size * accumulate, batch_size
    section.pop("gradient_accumulation_steps", None)
    section["bf16"], section["fp16"] = section.get("bf16", {}) | {"enabled": cuda}, {"enabled": False}
    if stage is not None:
        section["zero_optimization"] = {"stage": stage}
    path = folder / "bench.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return load_config(path, sections=config_sections)


def preset(name: str) -> dict[str, Any]:
    """A run of one of the presets, or of the width of the smallest GPT-2."""
    model = dict(zip(LlamaShape._fields, SMALLEST_GPT2, strict=True)) if name == "110m" else {"preset": name}
    return {
        "workload": "causal_lm",
        "data": {},
        "model": {"objective": {"type": "pretrain"}, **model},
        "deepspeed": {
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-4 if name == "110m" else 1e-3, "weight_decay": 0.01}},
            "scheduler": {"type": "WarmupCosine", "params": {"warmup": 0.1}},
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 0},
        },
    }


def run(arguments: argparse.Namespace) -> int:
    """Measure and print the tables. Returns 1 if the engine is slower than another, else 0."""
    if min(arguments.pairs, arguments.steps, arguments.batch_size, arguments.accumulate) < 1:
        raise ConfigError("use at least 1 for --pairs, --steps, --batch-size and --accumulate")
    try:
        import accelerate
    except ImportError as error:
        raise ConfigError(
            "accelerate, which this is measured against, is not installed: pip install -c constraints.txt '.[test]'"
        ) from error
    import transformers

    raw = preset(arguments.preset) if arguments.config is None else _read(arguments.config)
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        total = total_steps(arguments.pairs, arguments.steps)
        if arguments.random:
            count = total * arguments.batch_size * arguments.accumulate
            store = _random_store(folder, count, arguments.max_length)
        else:
            store = arguments.store or _example_store(raw, folder)
        ways = {"padded": [False], "packed": [True], "both": [False, True]}[arguments.batches]
        configs = [
            make_config(
                raw, folder, store, steps=total, packing=packing, cuda=cuda,
                batch_size=arguments.batch_size, accumulate=arguments.accumulate, max_length=arguments.max_length,
                stage=arguments.stage,
            )
            for packing in ways
        ]  # fmt: skip
        print(
            f"{arguments.config or arguments.preset}, micro-batches of {arguments.batch_size} x at most "
            f"{arguments.max_length} tokens, {arguments.accumulate} a step, {'bf16' if cuda else 'fp32'}\n"
            f"{torch.cuda.get_device_name() if cuda else f'CPU, {torch.get_num_threads()} threads'}; torch "
            f"{torch.__version__}, transformers {transformers.__version__}, accelerate {accelerate.__version__}; "
            f"{arguments.backend}, ZeRO {configs[0].deepspeed.zero_optimization.stage}\n"
            f"medians of {arguments.pairs} turns of {arguments.steps} steps each"
            f"{', seconds of CPU time' if arguments.cpu_time else ''}"
        )
        slower, pairs = False, list[tuple[Side, Side]]()
        try:
            for config in configs:
                sides = measure(
                    config, turns=arguments.pairs, steps=arguments.steps, backend=arguments.backend,
                    padding_mask=arguments.padding_mask, cpu_time=arguments.cpu_time,
                )  # fmt: skip
                slower |= report(sides)
                pairs += [(sides[0], peer) for peer in sides[1:]]
            task: Any = make_task(configs[0])
            lengths = task.dataset("train").lengths
            about = (
                f"Llama {arguments.config or arguments.preset}, micro-batches of {arguments.batch_size} x at most "
                f"{arguments.max_length} tokens{', all of that length' if arguments.random else ''}"
            )
            write(arguments, pairs, "tokens", about, task.flops_per_sample() * len(lengths) / int(lengths.sum()))
        finally:
            stop()
    print("slower than another" if slower else "not slower than any other")
    return int(slower)


def report(sides: list[Side]) -> bool:
    """Print the table of one run. Returns whether the engine is slower than another."""
    ours, *others = sides
    print(
        f"\n{'':22}{'tokens/s':>9}{'ours/theirs':>13}{'10 to 90 %':>15}{'95 % of median':>16}"
        f"{'loss before, after':>20}{'  peak MiB' if ours.peak_bytes else ''}"
    )
    slower = False
    for side in sides:
        ratio = ratio_of(ours.speeds, side.speeds)
        shown = (
            f"{ratio.median:>13.3f}{f'{ratio.tenth:.3f} - {ratio.ninetieth:.3f}':>15}"
            f"{f'{ratio.low:.3f} - {ratio.high:.3f}':>16}"
        )
        print(
            f"{side.name:22}{statistics.median(side.speeds):>9,.0f}{'' if side is ours else shown:44}"
            f"{side.loss_before:>12.5f}{side.loss_after:>8.4f}"
            + (f"{side.peak_bytes / 2**20:>10,.0f}" if side.peak_bytes else ""),
            flush=True,
        )
        slower |= side in others and ratio.high < 1
    return slower


def _read(path: Path) -> dict[str, Any]:
    config = load_config(path, sections=config_sections)
    if config.workload != "causal_lm" or config.model.objective.type == "dpo":
        raise ConfigError(f"{path}: give a configuration of causal_lm with the objective pretrain or sft")
    if config.deepspeed.optimizer.type.lower() != "adamw":
        raise ConfigError(f"{path}: deepspeed.optimizer.type: the sides are compared with AdamW")
    return json.loads(path.read_text(encoding="utf-8"))


def _example_store(raw: dict[str, Any], folder: Path) -> Path:
    """The example as a store in `folder`, with a tokenizer of the model's vocabulary, or the model's own."""
    model, out = raw["model"], folder / "store"
    kind: Any = KIND_OF[model["objective"]["type"]]
    write_examples(folder / "example")
    shape = PRESETS.get(model.get("preset"))
    vocabulary: dict[str, Any] = {
        "vocab_size": shape.vocab_size if shape else model.get("vocab_size") or DEFAULT_VOCAB_SIZE
    }
    if model.get("path"):
        vocabulary = {"tokenizer": Path(model["path"])}
    with _quiet():
        prepare(
            [folder / f"example/{kind}.jsonl"], out, kind=kind, val_sources=[folder / f"example/{kind}-val.jsonl"],
            workers=1, **vocabulary,
        )  # fmt: skip
    return out


def _random_store(folder: Path, count: int, length: int) -> Path:
    """Documents of random bytes: no padding, and no document twice in the run."""
    generator, learned = np.random.default_rng(0), np.ones(length, bool)
    (draft := folder / "draft").mkdir()
    plain_bytes().save_pretrained(draft / "tokenizer")
    with StoreWriter(draft, "text", 256) as writer:
        counts: dict[Split, int] = {"train": count, "val": _CHECKED}
        for split, documents in counts.items():
            for _ in range(documents):
                writer.add(split, [Rendered(generator.integers(1, 256, length), learned)])
        writer.finish(folder / "store")
    return folder / "store"
