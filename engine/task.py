"""Task: one training problem, stated without ranks, ZeRO stages or devices.

A task gives sums, never means: a loss summed over a batch together with the weight that it is to be averaged over.
The engine divides by the weight of the whole global batch, so a step does not depend on how that batch was split.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from trunkline.engine.errors import ConfigError, MissingDataError
from trunkline.engine.tracking import Tracking
from trunkline.engine.whole_state import WholeState

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


class Samples(Protocol):
    """A map-style data set, such as a torch.utils.data.Dataset that has a length. `dataset[i]` depends only on i.

    One that reads many samples faster than one by one has `__getitems__(indices)`, which returns the list of them, as
    for torch's own DataLoader.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class MeasuredSamples(Samples, Protocol):
    """A data set whose samples need different amounts of memory, and which says so.

    A step with a longer sample than any before is made with care for memory, and --find-micro-batch tries the longest.
    """

    lengths: np.ndarray
    """int64 [N]: how much there is of each sample, such as its tokens."""


class Task(ABC):
    """One training problem. `trunkline.models.fluid.task.FluidTask` is the example to read.

    A task must say what is abstract here. What follows `fingerprint` has a default that serves many.
    """

    unit: str = "samples"
    """What `weight` counts, in the plural: "values", "tokens", "pairs". Throughput is shown in it too."""

    generates: bool = False
    """Whether `evaluate` calls the model, or a part of it, as often as it likes: to decode texts, to sample. It is then
    given the bare model with whole weights, gathered on each rank once an evaluation, with all its methods, such as
    transformers' `generate`, with synced_gpus=False: else under FSDP it waits for ranks that generate less often. Ranks
    may go different ways. Each rank's device must hold the model beside its shard.
    """

    micro_batch_multiple: int = 1
    """Samples of a micro-batch that belong together: those of a BatchNorm's group, the pairs of a contrastive loss.

    They stand in contiguous places of the global batch. A micro-batch of training is a multiple of it, or the whole
    global batch. So it is whole groups, but for the global batch's last one, which may be short.
    """

    micro_batch_multiple_key: str = ""
    """Which setting decides it, such as "model.batch_norm_group", for messages."""

    assumed: Sequence[str] = ()
    """Of a task that was made without data: what it takes in their place, for whoever reads its plan."""

    tracking: Tracking = Tracking()
    """How TensorBoard, Weights & Biases and MLflow show the run."""

    metric_units: Mapping[str, str] = {}
    """The units of metrics, as pictures write them, by what a metric's name ends in after a "/": with {"m3": "Nm3"}
    "rmse/P/m3" is in Nm3. What has another unit gets axes of its own."""

    validation_loss: str = ""
    """How the metric "loss" of validation is another quantity than the loss of training, such as "not smoothed". Empty
    where both are one quantity: they share axes then."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if renamed := _renamed(cls):
            raise ConfigError(f"{cls.__name__}: {renamed}")
        if "dataset" in vars(cls):
            cls.dataset = _once(cls.dataset)  # type: ignore[assignment, method-assign]

    @abstractmethod
    def build_model(self) -> nn.Module:
        """A new model, initialised from torch's global generator, on the default device, in fp32.

        A class attribute `_no_split_modules` (transformers' name for it) lists the class names of its repeated
        blocks: the units of activation checkpointing and of sharding.
        """

    def initialize(self, model: nn.Module) -> None:
        """Put the weights that training starts from into what `build_model` returned, where they are not those.

        Called where no checkpoint is loaded into it. The default leaves it as it is. Raises CheckpointError,
        ConfigError or DataError.
        """
        return None

    @abstractmethod
    def dataset(self, split: str) -> Samples:
        """The samples of a split: `MeasuredSamples` where they differ in size.

        A run asks for "train" and "val". Where there is a "test", it is for who measures the trained model. However
        often it is asked for, a split is read once: whoever asks gets what was returned first. Raises DataError for a
        split that is not there.

        One that reads a store says which of its arrays: an attribute `arrays`, of trunkline.engine.data.store.Array.
        Their values are verified before the first step, once on each machine.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Sums:
        """{"loss": differentiable scalar sum, ...}: further entries are logged as means over the same weight."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Names the data set's content. A resumed run must find the same."""

    def meaning(self) -> dict[str, Any]:
        """What inputs and outputs stand for, such as {"classes": [...]} or a digest of columns, as JSON holds it.

        A checkpoint fits nothing else, also where another data set is accepted.
        """
        return {}

    def collate(self, samples: Sequence[Any]) -> Batch:
        """The batch of these samples. The default stacks samples that are dicts of tensors, arrays or numbers."""
        return default_collate(list(samples))

    def weight(self, batch: Batch) -> Tensor:
        """What the loss is averaged over: a scalar, on the batch's device. The default is the number of samples."""
        return batch["valid"].sum()

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        """Sums from which `summarize` computes the metrics. Called without gradients, with the model in eval mode.

        What stands for each sample of the split may be a sparse tensor that holds the batch's alone.

        The default is what `loss` sums, and the weight under the name "weight".
        """
        return self.loss(model, batch) | {"weight": self.weight(batch)}

    def judged_by(self, metric: str) -> dict[str, Any]:
        """What decides a metric's value beside the weights and the data, such as how texts are generated, as JSON holds
        it. Values are compared only where it is equal."""
        return {}

    def summarize(self, sums: Sums) -> dict[str, float]:
        """Metrics by name, from sums over the whole validation set. The default divides each by the weight.

        A name may have parts and end in one of `metric_units`, "rmse/P/m3": see engine/record/metric_panels.py for what
        is drawn together.
        """
        return {name: float(value / sums["weight"]) for name, value in sums.items() if name != "weight"}

    def show(self, sums: Sums, folder: Path) -> None:
        """Write what a person wants to see of an evaluation into a folder: pictures (.png), texts (.txt, .md), tables.

        Given what `summarize` is, on rank 0 alone, after each evaluation. Trackers take the files.
        """
        return None

    def direction(self, metric: str) -> Literal["min", "max"] | None:
        """Whether lower ("min") or higher ("max") is better of a metric that `summarize` names, parts included; None
        where neither is, or the name is not known. Of "loss" it is never asked: that is what training lowers."""
        return None

    def running_statistics(self, model: nn.Module) -> Sequence[str]:
        """Globs over the names of the buffers that are statistics of the data, changed in place by a forward pass in
        training. The engine makes them the same on every rank (optim/statistics.py). The default names BatchNorm's."""
        return ("*running_mean", "*running_var", "*num_batches_tracked")

    def largest_sample(self) -> Any:
        """A training sample as large as the configuration allows, for a plan where there are no data.

        Asked of a task that was made without them. Raises MissingDataError where only the data say how large one is, as
        the default does.
        """
        raise MissingDataError(f"the data say how large a sample of {type(self).__name__} is")

    def flops_per_sample(self) -> float:
        """Useful floating-point operations of one sample's forward and backward pass, without recomputation.

        0 where they are not counted: then the share of the device's peak is not shown.
        """
        return 0.0

    def notes(self) -> list[str]:
        """Lines for whoever starts the run: what of the data was left out, what of the model is frozen."""
        return []

    def tensor_name(self, name: str) -> str | None:
        """What a parameter or buffer of the model is called by `file_tensors`; None leaves it out of files."""
        return name

    def file_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What files of weights hold for these tensors: other names, or others cut from them or put together of them.

        Given the whole model's, or some that make up others of their own; also without values, on the device "meta".
        """
        return tensors

    def write_best(self, folder: Path, state: Callable[[], WholeState]) -> None:
        """Write the best weights so far into the run's folder in the form of another program, if there is one.

        Called on rank 0 alone, beside training, when a checkpoint of a new best evaluation is whole. `state()` reads
        it. What is raised is a warning.
        """
        return None

    def keeps_best(self, folder: Path, best: WholeState | None) -> bool:
        """Whether what `write_best` has written there is of the run's best evaluation. Called on rank 0 at the start.

        What is of another one, such as of a branch that a resume has left, is renamed here, and that is said. `best`
        holds step and metrics, no tensors; None before the first evaluation. If not, `write_best` follows.
        """
        return False

    def read_state(self, path: Path, steps_per_epoch: int) -> WholeState:
        """What training.start_from names, another program's checkpoint, in the model's names. Called on rank 0 alone.

        Its `step` is of this run, which has `steps_per_epoch`. Raises CheckpointError or ConfigError.
        """
        raise ConfigError(
            f"training.start_from: {path}: this workload reads no checkpoints of other programs: remove it"
        )

    def save_assets(self, folder: Path) -> dict[str, Any]:
        """Write beside a model's weights whatever else prediction needs: a schema, a tokenizer.

        Returns what other programs look for in config.json there, which holds the run's configuration beside it.
        """
        return {}


def checked_task(task: Task) -> Task:
    """The task, if it is one. Raises ConfigError for an object of the protocol that was, with what to rename."""
    if not isinstance(task, Task):
        kind = type(task)
        remedy = "; ".join(filter(None, ["derive it from trunkline.engine.task.Task", _renamed(kind)]))
        raise ConfigError(f"{kind.__name__} is no task: {remedy}")
    return task


_RENAMED = {
    "datasets": "datasets() is now dataset(split), which returns the one that is asked for",
    "weight_name": "weight_name(name) is now tensor_name(name)",
}


def _renamed(kind: type) -> str:
    return "; ".join(message for old, message in _RENAMED.items() if hasattr(kind, old))


def _once(read: Callable[[Any, str], Samples]) -> Callable[[Any, str], Samples]:
    """The method `dataset` of one class, called once for each split of a task."""

    @wraps(read)
    def dataset(task: Any, split: str) -> Samples:
        held = task.__dict__.setdefault("_read", {})
        key = (read.__qualname__, split)  # not the function, which could not be pickled under its name
        if key not in held:
            held[key] = read(task, split)
        return held[key]

    return dataset


def add_sums(total: Sums | None, part: Sums) -> Sums:
    """total + part, entry by entry, in fp64 where floating; detached. Use None to start.

    The total of sparse entries is dense. They are added to it in place, in a time that their own values decide alone.
    """
    part = {k: v.detach().to(torch.float64) if v.is_floating_point() else v.detach() for k, v in part.items()}
    if total is None:
        return {k: v.to_dense() if v.is_sparse else v for k, v in part.items()}
    return {k: total[k].add_(v) if v.is_sparse else total[k] + v for k, v in part.items()}
