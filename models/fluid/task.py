"""FluidTask: predict the next minute of a gas network from the last T."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline.engine.checkpoint.trained import trained_sections
from trunkline.engine.checkpoint.weights import load_weights
from trunkline.engine.data.lazy import opened_late
from trunkline.engine.errors import ConfigError, DataError
from trunkline.engine.task import Batch, Sums, Task
from trunkline.models.fluid.config import FluidData, FluidModel
from trunkline.models.fluid.data import FluidWindows, Sample, collate
from trunkline.models.fluid.device_tokens import Places, spans
from trunkline.models.fluid.metrics import DIRECTIONS, Errors, flat_scores
from trunkline.models.fluid.network import FluidDecoder
from trunkline.models.fluid.noise import history_noise
from trunkline.models.fluid.normalization import Normalization
from trunkline.models.fluid.ridge import MOST_BYTES, Features, NormalEquations, switches
from trunkline.models.fluid.rollout import Surrogate, rollout
from trunkline.models.fluid.schema import Schema
from trunkline.models.fluid.store import Store
from trunkline.models.fluid.words import QUANTITIES, unit_in_words

SKIP_PENALTY = 1e-6
_TRAINING_ONLY = ("path", "rollout_minutes")  # of the model's keys, those that its weights do not depend on
_SKIP_NOISE = 0.3
"""Of the input noise: the whole of it makes the autoregression pull to the mean. RMSE over a day, on the demo's
validation days, was .221 with the whole and .195 with this."""


class FluidTask(Task):
    """The fluid workload over a prepared data set. Raises DataError or ConfigError if the two do not fit."""

    unit = "values"
    metric_units: Mapping[str, str] = {name: unit_in_words(name) or "no unit" for name in (*QUANTITIES, "-", "?")}

    def __init__(self, data: FluidData, model: FluidModel) -> None:
        self.data, self.model = data, model
        self.store = Store.open(data.store)
        self.schema = self.store.schema
        self.normalization = _normalization(self.schema).fit(self.store.statistics, data.normalization)

    def build_model(self) -> FluidDecoder:
        """A new decoder with this data set's statistics and, if asked for, its fitted ridge autoregression."""
        model = make_decoder(self.schema, self.data, self.model)
        model.normalization.load_state_dict(self.normalization.state_dict())
        if model.skip is not None and self.model.path is None:
            equations = NormalEquations.over_training_split(self.store, self.normalization, model.skip.features)
            model.skip.take(equations, SKIP_PENALTY, _SKIP_NOISE * self.model.input_noise)
        return model

    def initialize(self, model: nn.Module) -> None:
        """The weights of `model.path`. Raises CheckpointError, ConfigError or DataError."""
        if self.model.path is None:
            return
        folder, data, other = trained_sections(Path(self.model.path), "fluid", FluidData, FluidModel)
        if Schema.read(folder) != self.schema:
            raise DataError(f"model.path: {folder} was trained on other columns than {self.store.root} has")
        ours, theirs = (
            {
                f"model.{key}": value
                for key, value in section.in_full().model_dump().items()
                if key not in _TRAINING_ONLY
            }
            | {"data.history": its.history, "data.normalization": its.normalization}
            for section, its in ((self.model, self.data), (other, data))
        )
        for key, value in theirs.items():
            if ours[key] != value:
                raise ConfigError(
                    f"model.path: {folder} has {key} {value!r}, and this run {ours[key]!r}: use {value!r}"
                )
        load_weights(model, folder)
        loaded = cast(FluidDecoder, model).normalization.state_dict()
        if any(not torch.equal(value, loaded[name].cpu()) for name, value in self.normalization.state_dict().items()):
            raise DataError(
                f"model.path: {folder} was trained on other days than {self.store.root} holds, which normalise values "
                "otherwise: train from the start"
            )

    def dataset(self, split: str) -> FluidWindows:
        """Windows of "train", "val" or "test". Raises DataError if there are none, as of test cases without outputs."""
        targets = self.data.history - self.model.window + 1
        repeats = self.data.event_repeats if split == "train" else 1
        return FluidWindows(self.store, split, self.data.history, targets, self.model.rollout_minutes - 1, repeats)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """{"x", "target", "mask"} and, where events are repeated, "weight"; see trunkline.models.fluid.data."""
        batch = collate(samples)
        if self.data.event_repeats == 1:
            del batch["weight"]
        return batch

    def weight(self, batch: Batch) -> Tensor:
        """The number of targets that are present. Where events are repeated, each counts as its window does."""
        return self._weights(batch).sum()

    def loss(self, model: nn.Module, batch: Batch) -> Sums:
        """Squared error summed over the targets present, with noise on the input states if the options ask for it."""
        x = batch["x"]
        if self.model.input_noise:
            history, num_boundary = self.data.history, self.schema.num_boundary
            noise = history_noise(batch["draw"], history, self.schema.num_states)
            x = x.clone()  # of the minutes after the history no state is seen
            scale = self.normalization.state_scale.to(x.device) * self.model.input_noise
            x[:, :history, num_boundary:] += noise.mul_(scale)
        total, _ = model(x, batch["target"], self._weights(batch))
        return {"loss": total}

    def _weights(self, batch: Batch) -> Tensor:
        """[B, T', Vs]: what each target counts in the loss; bool where all count the same."""
        mask = _mask(batch)
        return mask * batch["weight"][:, None, None] if "weight" in batch else mask

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        """Errors of the minute after the history, of the model and of persistence; and, where the model is trained on
        rollouts, of all minutes of them."""
        history, minutes = self.data.history, self.model.rollout_minutes
        target, mask = batch["target"][:, -minutes:], _mask(batch)[:, -minutes:]
        boundary, states = batch["x"].split([self.schema.num_boundary, self.schema.num_states], dim=-1)
        normalization = self.normalization.to(target.device)
        predicted = rollout(
            Surrogate(model, history),
            F.pad(boundary, (0, 0, 1, 0)),  # that of a window's first minute is not looked at
            states[:, :history],
            missing=normalization.state_offset,
        )
        last = states[:, history - 1]
        last = torch.where(last.isnan(), normalization.state_offset, last)
        errors = {
            "model": Errors.of(predicted[:, 0], target[:, 0], mask[:, 0], normalization),
            "persistence": Errors.of(last, target[:, 0], mask[:, 0], normalization),
        }
        if minutes > 1:
            errors["rollout"] = Errors.of(predicted, target, mask, normalization)
        return {name: value for kind, each in errors.items() for name, value in each.as_sums(kind).items()}

    def summarize(self, sums: Sums) -> dict[str, float]:
        """ "mse", "mae", "rmse", "r2" (normalised), each also by group ("mse/P") and, physical, by unit ("rmse/P/MPa").

        The same for persistence, as "persistence_mse" and so on, and for rollouts of `rollout_minutes`, "rollout_mse".
        """
        scale = self.normalization.state_scale
        prefixes = {"model": "", "persistence": "persistence_"}
        if self.model.rollout_minutes > 1:
            prefixes["rollout"] = "rollout_"
        scores: dict[str, float] = {}
        for kind, prefix in prefixes.items():
            scores |= flat_scores(Errors.from_sums(sums, kind, scale).scores(self.schema), prefix)
        return scores

    def direction(self, metric: str) -> Literal["min", "max"] | None:
        """Errors are better low and R2 high, of each group and unit too. Persistence does not depend on the model."""
        return DIRECTIONS.get(metric.removeprefix("rollout_").split("/")[0])

    def flops_per_sample(self) -> float:
        """Matrix products and visible attention pairs, forward and backward (three times forward).

        The ridge autoregression, which has no gradient, is left out.
        """
        d, _, layers, d_ff, d_token = self.model.shape
        variables, states = self.schema.num_variables, self.schema.num_states
        per_token = 2 * d_token * d + layers * 2 * (4 * d * d + 2 * d * d_ff)
        if self.model.tokens == "scalar":
            history, tokens, read, features = self.data.history, variables, states, variables + states
            values = 2 * d_token * (variables + states)
        else:
            places, seen = Places.of(self.schema), len(spans(self.model.window))
            history, tokens, features = self.data.history - self.model.window + 1, places.num_devices, seen * variables
            read, values = tokens, 2 * d_token * (features + states) + 2 * d * seen * self.schema.num_boundary
        width = self.model.dense_skip
        dense = 2 * width * (features + width + states)
        minute = tokens * per_token + read * 2 * d * d_token + values + dense
        pairs = tokens**2 * history * (history + 1) // 2
        return 3.0 * self.model.rollout_minutes * (history * minute + layers * 4 * d * pairs)

    def fingerprint(self) -> str:
        """Names the data set's content."""
        return self.store.fingerprint

    def meaning(self) -> dict[str, Any]:
        """The columns, in their order, the units in which errors are measured, and which samples an epoch has."""
        columns = hashlib.sha256("\n".join(self.schema.columns).encode()).hexdigest()
        events = {"data.event_repeats": self.data.event_repeats}
        return {"columns": columns, "data.normalization": self.data.normalization} | events

    def save_assets(self, folder: Path) -> dict[str, Any]:
        """schema.json, and network.json where the data set has one."""
        self.schema.write(folder)
        if (network := self.store.root / "network.json").is_file():
            shutil.copyfile(network, folder / "network.json")
        return {}


class _WithoutData(FluidTask):
    """The task without its data, which are read only where something is asked that needs them."""

    def __init__(self, data: FluidData, model: FluidModel) -> None:
        self.data, self.model = data, model
        self.store = opened_late(lambda: Store.open(data.store))
        self.schema = opened_late(lambda: self.store.schema)


make_task, weights_task = FluidTask, _WithoutData


def make_decoder(schema: Schema, data: FluidData, model: FluidModel) -> FluidDecoder:
    """A decoder of the configured shape for a network's columns; its statistics are yet to be filled in."""
    if model.linear_skip and data.history < 2:
        raise ConfigError("model.linear_skip looks at the last two minutes: set data.history to 2 or more, not 1")
    if model.window > data.history:
        raise ConfigError(
            f"model.window is {model.window} minutes, and the model sees {data.history}: set data.history to "
            f"{model.window} or more"
        )
    return FluidDecoder(
        model.shape,
        num_boundary=schema.num_boundary,
        num_states=schema.num_states,
        history=data.history,
        target=model.target,
        input_noise=model.input_noise,
        linear_skip=_skip_features(schema, model),
        dense_skip=model.dense_skip,
        places=Places.of(schema, model.own_weights) if model.tokens == "device" else None,
        window=model.window,
    )


def _skip_features(schema: Schema, model: FluidModel) -> Features | None:
    """What the linear skip sees. Raises ConfigError where "switches" are too many to fit."""
    if model.linear_skip != "switches":
        return Features.of_states(schema.num_boundary, schema.num_states) if model.linear_skip else None
    features = Features.with_products(schema, switches(schema), own=True)
    if (needed := features.fit_bytes(schema.num_states)) > MOST_BYTES:
        raise ConfigError(
            f'model.linear_skip is "switches": to fit {len(features)} features takes {needed / 2**30:.1f} GiB, more '
            f"than {MOST_BYTES >> 30}: use true"
        )
    return features


def _normalization(schema: Schema) -> Normalization:
    return Normalization(schema.num_boundary, schema.num_states)


def _mask(batch: Batch) -> Tensor:
    return batch["mask"] & batch["valid"][:, None, None]
