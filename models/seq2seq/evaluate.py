"""Evaluation of a trained encoder-decoder on held-out data, beside what it started from.

compare(run, device, ...)   -> Comparison: metrics of both
run(arguments)              what launchers/evaluate.py calls
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from trunkline.engine.checkpoint.trained import warn_of_other_data
from trunkline.engine.checkpoint.weights import described
from trunkline.engine.data.loading import evaluation_loader
from trunkline.engine.errors import ConfigError
from trunkline.engine.evaluation import to_device
from trunkline.engine.machine.files import write_json
from trunkline.engine.record.pictures import BLUE, RED, picture
from trunkline.engine.record.tables import metrics_table
from trunkline.engine.task import Batch, Sums, add_sums
from trunkline.models.seq2seq.task import Seq2SeqTask, make_task
from trunkline.models.seq2seq.trained import at, load_sections
from trunkline.models.text.folder import started_from

TRAINED, START = "trained", "start"
_EVERY = 1 << 53
_COLORS = {TRAINED: BLUE, START: RED}


@dataclass
class Comparison:
    """metrics: by model, then by name. sums: by model, what they were computed from.

    exact: by model, of each generated text the tokens of its prompt and whether it is what was expected, int64 [N, 2].
    """

    task: Seq2SeqTask
    split: str
    samples: int
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    sums: dict[str, Sums] = field(default_factory=dict)
    exact: dict[str, np.ndarray] = field(default_factory=dict)


def compare(
    run: Path, device: torch.device, *, split: str = "val", store: Path | None = None, batch_size: int = 16,
    max_samples: int | None = None, generate: int | None = None, progress: bool = False,
) -> Comparison:  # fmt: skip
    """Evaluate a run's weights and what they started from; texts for `generate` evenly spaced samples, or for all.

    Raises CheckpointError, ConfigError or DataError.
    """
    folder, data, model = load_sections(run)
    if progress:
        print(described(folder))
    changed: dict[str, Any] = {} if store is None else {"store": str(store)}
    if model.objective.type == "pairs":  # of texts it says how they are cut
        changed |= {"packing": False, "packed_source_length": "auto", "packed_target_length": "auto"}
    data = data.model_copy(update=changed)
    texts = (max_samples or _EVERY) if generate is None else generate
    generation = model.generation.model_copy(update={"samples": texts})
    model = model.model_copy(update={"generation": generation})
    task = make_task(data, at(folder, model))
    if store is None:
        warn_of_other_data(folder, task.store.fingerprint, task.store.root)
    dataset: Any = task.dataset(split)
    task.store.verify(array.name for array in dataset.arrays)
    size = len(dataset)
    result = Comparison(task, split, size if max_samples is None else min(size, max_samples))
    begun = started_from(model.path or model.weights, "model.path" if model.path else "model.weights")
    if progress and begun:
        print(f"{START}: {begun}, as it is now")
    networks = {TRAINED: task} | ({START: make_task(data, model)} if begun else {})
    for name, source in networks.items():
        network = source.build_model()
        source.initialize(network)
        batches = evaluation_loader(
            task, dataset, num_samples=max_samples, micro_batch_size=batch_size, world_size=1, rank=0
        )
        bar = tqdm(batches, desc=f"evaluate {split}, {name}", unit="batch", disable=not progress)
        _measure(result, name, network.to(device).eval(), (to_device(batch, device) for batch in bar))
    return result


@torch.no_grad()
def _measure(result: Comparison, name: str, network: nn.Module, batches: Iterator[Batch]) -> None:
    task, sums, exact = result.task, cast(Sums | None, None), [np.empty((0, 2), np.int64)]
    for batch in batches:
        part = task.likelihood(network, batch)
        if task.generates:
            texts = task.generated(network, batch)
            part |= task.texts.sums(texts)
            exact += [np.array([[len(text.prompt), task.texts.is_exact(text)]]) for text in texts]
        sums = add_sums(sums, {key: value.cpu() for key, value in part.items()})
    assert sums is not None, "a split without samples is refused when it is opened"
    result.sums[name], result.metrics[name], result.exact[name] = sums, task.summarize(sums), np.concatenate(exact)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and write evaluation.{md,json,png} and generated.md; prints the table. Returns the exit status."""
    for name, least in (("batch_size", 1), ("max_samples", 1), ("generate", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: use {least} or more")
    result = compare(
        arguments.run, arguments.device, split=arguments.split, store=arguments.store, batch_size=arguments.batch_size,
        max_samples=arguments.max_samples, generate=arguments.generate, progress=True,
    )  # fmt: skip
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    table, signatures = render(result), result.task.signatures
    parts = [f"# {arguments.run}", table, *(f"{name}: {how}" for name, how in signatures.items())]
    written = ["evaluation.md", "evaluation.json"]
    if any(len(exact) for exact in result.exact.values()):
        plot_exact(result.exact, out / "evaluation.png")
        result.task.show(result.sums[TRAINED], out)
        parts.append("![](evaluation.png)")
        written += ["evaluation.png", "generated.md"]
    (out / "evaluation.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    found = {"split": result.split, "samples": result.samples, "metrics": result.metrics, "signatures": signatures}
    write_json(out / "evaluation.json", found)
    print(f"{table}\nwrote {', '.join(written)} to {out}")
    return 0


def render(result: Comparison) -> str:
    """The metrics as a table in Markdown, a line for each model."""
    return metrics_table(f"{result.samples:,} samples of {result.split}", result.metrics)


def plot_exact(exact: dict[str, np.ndarray], path: Path, bins: int = 8) -> None:
    """The share of texts that are what was expected, by the length of the prompt: as many texts in each bin."""
    with picture(path, 7, 3.6) as figure:
        axes = figure.subplots()
        for name, found in exact.items():
            some = [each for each in np.array_split(found[found[:, 0].argsort(kind="stable")], bins) if len(each)]
            lengths, shares = (np.array([each[:, column].mean() for each in some]) for column in (0, 1))
            axes.plot(lengths, shares, label=name, color=_COLORS[name], marker="o", markersize=3)
        axes.set_xlabel("tokens of the prompt")
        axes.set_ylabel("share of texts as expected")
        axes.set_ylim(-0.02, 1.02)
        axes.legend()
