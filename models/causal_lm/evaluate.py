"""Evaluation of a trained language model on held-out data, beside what it started from.

    compare(run, device, ...)              -> Comparison: metrics of both, and what is drawn of them
    run(arguments)  what launchers/evaluate.py calls

What was fine-tuned is compared with the model that it started from. What was trained from nothing is compared with the
frequencies of tokens in the training split: what a model knows that looks at no context.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from trunkline.engine.checkpoint.trained import warn_of_other_data
from trunkline.engine.checkpoint.weights import described
from trunkline.engine.data.loading import evaluation_loader
from trunkline.engine.errors import ConfigError
from trunkline.engine.evaluation import to_device
from trunkline.engine.machine.files import made_folder, write_json
from trunkline.engine.record.tables import metrics_table
from trunkline.engine.task import Batch, Sums, add_sums
from trunkline.models.causal_lm.build import make_network
from trunkline.models.causal_lm.config import CausalLMModel
from trunkline.models.causal_lm.dpo import PolicyAndReference, pair_sums
from trunkline.models.causal_lm.network import CausalLM
from trunkline.models.causal_lm.plots import plot_margins, plot_positions
from trunkline.models.causal_lm.task import LanguageModelTask, PreferenceTask, make_task
from trunkline.models.causal_lm.trained import at, load_sections
from trunkline.models.text.folder import started_from

TRAINED, START, FREQUENCIES = "trained", "start", "token frequencies"


@dataclass
class Comparison:
    """metrics: by model, then by name.

    positions: by model, the mean loss by place in the document [L], NaN where nothing is predicted; not of DPO.
    margins: of each pair [N], by how much training raised log p(chosen) - log p(rejected), in nats; of DPO.
    """

    split: str
    samples: int
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    positions: dict[str, np.ndarray] = field(default_factory=dict)
    margins: np.ndarray = field(default_factory=lambda: np.empty(0))


@dataclass(frozen=True)
class Held:
    """The samples that are evaluated, batch by batch on a device."""

    task: LanguageModelTask
    split: str
    device: torch.device
    batch_size: int
    max_samples: int | None
    progress: bool

    def batches(self, title: str) -> Iterator[Batch]:
        """Every chosen sample once."""
        loader = evaluation_loader(
            self.task, self.task.dataset(self.split), num_samples=self.max_samples,
            micro_batch_size=self.batch_size, world_size=1, rank=0,
        )  # fmt: skip
        for batch in tqdm(loader, desc=title, unit="batch", disable=not self.progress):
            yield to_device(batch, self.device)


def compare(
    run: Path, device: torch.device, *, split: str = "val", store: Path | None = None, batch_size: int = 16,
    max_samples: int | None = None, progress: bool = False,
) -> Comparison:  # fmt: skip
    """Evaluate a run's weights and what they started from. Raises CheckpointError, ConfigError or DataError."""
    folder, data, model = load_sections(run)
    if progress:
        print(described(folder))
    if store is not None:
        data = data.model_copy(update={"store": str(store)})
    task = make_task(data, at(folder, model))
    if store is None:
        warn_of_other_data(folder, task.store.fingerprint, task.store.root)
    held = Held(task, split, device, batch_size, max_samples, progress)
    dataset: Any = task.dataset(split)
    task.store.verify(array.name for array in dataset.arrays)
    size = len(dataset)
    result = Comparison(split, size if max_samples is None else min(size, max_samples))
    if isinstance(task, PreferenceTask):
        policy, reference = (_network(task, Path(place), model, device) for place in (folder, model.path or ""))
        _compare_preferences(result, held, task, PolicyAndReference(policy, reference))
        return result
    start = started_from(model.path)
    networks = {TRAINED: folder} | ({} if start is None else {START: start})
    for name, place in networks.items():
        _measure_likelihood(result, held, name, _network(task, place, model, device))
    if START not in networks and model.objective.type == "pretrain":
        result.metrics[FREQUENCIES] = frequencies(held)
    return result


def _network(task: LanguageModelTask, folder: Path, model: CausalLMModel, device: torch.device) -> CausalLM:
    return make_network(at(folder, model), task.hf_config).to(device).eval()


@torch.no_grad()
def _measure_likelihood(result: Comparison, held: Held, name: str, network: nn.Module) -> None:
    longest = held.task.data.max_length
    nats, tokens = torch.zeros(longest, dtype=torch.float64), torch.zeros(longest, dtype=torch.float64)
    sums: Sums | None = None
    for batch in held.batches(f"evaluate {held.split}, {name}"):
        loss, wanted = held.task.by_token(network, batch)
        places = batch["position_ids"][wanted].cpu()
        nats.index_add_(0, places, loss[wanted].double().cpu())
        tokens += places.bincount(minlength=longest)
        sums = add_sums(sums, {"loss": loss.sum(), "tokens": wanted.sum()})
    assert sums is not None, "a split without samples is refused when it is opened"
    result.metrics[name] = held.task.summarize(sums)
    result.positions[name] = torch.where(tokens > 0, nats / tokens, torch.nan).numpy()


@torch.no_grad()
def _compare_preferences(result: Comparison, held: Held, task: PreferenceTask, network: PolicyAndReference) -> None:
    margins: list[np.ndarray] = []
    sums: Sums | None = None
    for batch in held.batches(f"evaluate {held.split}"):
        policy, reference = task.log_probabilities(network, batch)
        raised = policy - reference
        margins.append((raised[:, 0] - raised[:, 1])[batch["valid"]].cpu().numpy())
        sums = add_sums(sums, pair_sums(policy, reference, batch, task.options))
    assert sums is not None, "a split without samples is refused when it is opened"
    result.metrics[TRAINED] = task.summarize(sums)
    result.metrics[START] = {"prefers_chosen": result.metrics[TRAINED].pop("reference_prefers_chosen")}
    result.margins = np.concatenate(margins)


def frequencies(held: Held) -> dict[str, float]:
    """What `held` loses under the frequencies of tokens in the training split, each counted once more."""
    counts = held.task.store.split("train").counts() + 1
    log_p = torch.from_numpy(np.log(counts / counts.sum()))
    sums: Sums | None = None
    for batch in held.batches(f"evaluate {held.split}, {FREQUENCIES}"):
        wanted = batch["targets"][held.task.predicted(batch)].cpu()
        sums = add_sums(sums, {"loss": -log_p[wanted].sum(), "tokens": torch.tensor(len(wanted))})
    assert sums is not None, "a split without samples is refused when it is opened"
    return held.task.summarize(sums)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and write evaluation.{md,json,png}; prints the table. Returns the exit status."""
    for name in ("batch_size", "max_samples"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: use 1 or more")
    out = made_folder(arguments.out)
    result = compare(
        arguments.run, arguments.device, split=arguments.split, store=arguments.store,
        batch_size=arguments.batch_size, max_samples=arguments.max_samples, progress=True,
    )  # fmt: skip
    table = render(result)
    picture = out / "evaluation.png"
    if len(result.margins):
        plot_margins(result.margins, picture)
    else:
        plot_positions(result.positions, picture)
    (out / "evaluation.md").write_text(f"# {arguments.run}\n\n{table}\n\n![]({picture.name})\n", encoding="utf-8")
    write_json(out / "evaluation.json", {"split": result.split, "samples": result.samples, "metrics": result.metrics})
    print(f"{table}\nwrote {out}/evaluation.md, evaluation.json and evaluation.png")
    return 0


def render(result: Comparison) -> str:
    """The metrics as a table in Markdown, a line for each model."""
    return metrics_table(f"{result.samples:,} samples of {result.split}", result.metrics)
