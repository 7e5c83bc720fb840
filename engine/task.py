"""Task: one training problem, stated without ranks, ZeRO stages or devices.

A task gives sums, never means: a loss summed over a batch together with the weight that it is to be averaged over.
The engine divides by the weight of the whole global batch, so a step does not depend on how that batch was split.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

Batch = dict[str, Tensor]
"""Named tensors whose first dimension is the sample, [B, ...].

The engine adds two of its own to what `Task.collate` returns:

    valid  [B] bool   False marks a sample that only fills up a short batch. It must carry no weight: not in
                      `weight`, not in `loss`, not in any sum of `evaluate`.
    draw   [B] int64  a key that names this draw of this sample (seed, epoch and index hashed). Randomness that
                      belongs to a sample, such as added noise, comes from it (data/randomness.py), so it is the same
                      on any number of ranks.
"""

Sums = dict[str, Tensor]
"""Additive statistics: adding them over batches and ranks gives those of the whole. Tensors of any fixed shape."""


class Task(Protocol):
    """One training problem. `trunkline.models.fluid.task.FluidTask` is the example to read."""

    unit: str
    """What `weight` counts, in the plural: "values", "tokens", "pairs". Throughput is shown in it too."""

    def build_model(self) -> nn.Module:
        """A new model, initialised from torch's global generator, on the default device, in fp32.

        A class attribute `_no_split_modules` (transformers' name for it) lists the class names of its repeated
        blocks: the units of activation checkpointing and of sharding.
        """

    def datasets(self) -> dict[str, Dataset[Any]]:
        """The map-style datasets "train" and "val". `dataset[i]` must depend on nothing but i.

        One whose samples need different amounts of memory may say how much there is of each: an attribute `lengths`,
        int64 [N]. Steps that hold more than any before are then made with care for memory.

        One that reads a store says which of its arrays: an attribute `arrays`, of trunkline.engine.data.store.Array.
        Their values are verified before the first step, once on each machine.
        """

    def collate(self, samples: Sequence[Any]) -> Batch:
        """The batch of these samples."""

    def weight(self, batch: Batch) -> Tensor:
        """What the loss is averaged over (valid values, tokens, pairs, images): a scalar, on the batch's device."""

    def loss(self, model: nn.Module, batch: Batch) -> Sums:
        """{"loss": differentiable scalar sum, ...}: further entries are logged as means over the same weight."""

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        """Sums from which `summarize` computes the metrics. Called without gradients, with the model in eval mode."""

    def summarize(self, sums: Sums) -> dict[str, float]:
        """Metrics by name, from sums over the whole validation set."""

    def direction(self, metric: str) -> Literal["min", "max"] | None:
        """Whether lower ("min") or higher ("max") is better of a metric that `summarize` names, parts included; None
        where neither is, or the name is not known. Of "loss" it is never asked: that is what training lowers."""

    def flops_per_sample(self) -> float:
        """Useful floating-point operations of one sample's forward and backward pass, without recomputation."""

    def fingerprint(self) -> str:
        """Names the data set's content; a resumed run must find the same."""

    def notes(self) -> list[str]:
        """Lines for whoever starts the run: what of the data was left out, what of the model is frozen."""

    def weight_name(self, name: str) -> str | None:
        """What a parameter or buffer of the model is called by `file_tensors`; None leaves it out of files."""

    def file_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What files of weights hold for these tensors: other names, or others cut from them or put together of them.

        Given the whole model's, or some that make up others of their own; also without values, on the device "meta".
        """

    def save_assets(self, folder: Path) -> dict[str, Any]:
        """Write beside a model's weights whatever else prediction needs: a schema, a tokenizer.

        Returns what other programs look for in config.json there, which holds the run's configuration beside it.
        """


def add_sums(total: Sums | None, part: Sums) -> Sums:
    """total + part, entry by entry, in fp64 where floating; detached. Use None to start."""
    part = {k: v.detach().to(torch.float64) if v.is_floating_point() else v.detach() for k, v in part.items()}
    return part if total is None else {k: total[k] + v for k, v in part.items()}
