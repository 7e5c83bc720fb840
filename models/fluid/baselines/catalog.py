"""The baselines by name, and those of an evaluation: kept with the store, or fitted now.

baselines_of(store, normalization, names, minutes, ...)  -> Baselines: {"ridge + MLP": forecaster, ...}, and facts
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from trunkline.engine.errors import ConfigError, DataError
from trunkline.models.fluid.baselines.graph import GRAPH, ROUNDS, graph
from trunkline.models.fluid.baselines.kept import digest, folder_of, keep, kept, minutes_kept
from trunkline.models.fluid.baselines.linear import (
    DEFAULT_PENALTY,
    PENALTIES,
    LinearAutoregression,
    Persistence,
    all_columns,
    fit_linear,
)
from trunkline.models.fluid.baselines.mlp import MLP, mlp
from trunkline.models.fluid.baselines.residual import RIDGE_PENALTY, Budget, Corrected, Settings, features_of, train
from trunkline.models.fluid.baselines.switches import NOISES, interactions, limits
from trunkline.models.fluid.normalization import Normalization
from trunkline.models.fluid.ridge import JITTER, Features
from trunkline.models.fluid.rollout import Forecaster
from trunkline.models.fluid.store import Store

TITLES = {
    "ridge": "ridge",
    "switches": "ridge with switches",
    "mlp": "ridge + MLP",
    "graph": "graph network",
    "persistence": "persistence",
}
"""What each is called in tables, in their order."""
DEFAULT_MINUTES = 1.0
FEW_STEPS = 100
"""A network that trained fewer says nothing of what networks can do."""
_FORMAT = 1  # of what is kept: to be raised when the same settings come to mean something else


@dataclass(frozen=True)
class Linear:
    """A closed form over `features(store)`, which raises ConfigError for a data set that has none.

    limits: what a user must be told of the features of a data set, or nothing
    """

    features: Callable[[Store], Features]
    noises: Sequence[float]
    limits: Callable[[Store], str] = lambda store: ""

    def about(self) -> dict[str, Any]:
        return {"noises": list(self.noises), "penalties": list(PENALTIES), "default_penalty": DEFAULT_PENALTY}

    def empty(self, store: Store, normalization: Normalization) -> LinearAutoregression:
        return LinearAutoregression(normalization, self.features(store))

    def fit(
        self, store: Store, normalization: Normalization, budget: Budget, device: torch.device, progress: bool
    ) -> tuple[LinearAutoregression, dict[str, float]]:
        return fit_linear(store, normalization, self.features(store), device, noises=self.noises, progress=progress)


@dataclass(frozen=True)
class Network:
    """A network beside a ridge; `make(store)` raises ConfigError for a data set that it cannot be made for.

    shape: what else than the settings decides the network
    """

    make: Callable[[Store], nn.Module]
    settings: Settings
    shape: dict[str, Any] = field(default_factory=dict)

    def about(self) -> dict[str, Any]:
        return {**asdict(self.settings), **self.shape, "ridge_penalty": RIDGE_PENALTY}

    def empty(self, store: Store, normalization: Normalization) -> Corrected:
        return Corrected(normalization, features_of(store.schema), self.make(store), self.settings.noise)

    def fit(
        self, store: Store, normalization: Normalization, budget: Budget, device: torch.device, progress: bool
    ) -> tuple[Corrected, dict[str, float]]:
        return train(store, normalization, lambda: self.make(store), self.settings, budget, device, progress)


KINDS: dict[str, Linear | Network] = {
    "ridge": Linear(all_columns, (0.0,)),
    "switches": Linear(interactions, NOISES, limits),
    "mlp": Network(mlp, MLP),
    "graph": Network(graph, GRAPH, {"rounds": ROUNDS}),
}


@dataclass
class Baselines:
    """forecasters and the facts of their fits, by title; notes: what was left out or could not be kept, and why."""

    forecasters: dict[str, Forecaster] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def baselines_of(
    store: Store,
    normalization: Normalization,
    names: Collection[str] | None = None,
    minutes: float | None = None,
    *,
    without: Collection[str] = (),
    progress: bool = False,
) -> Baselines:
    """The baselines of these names (of flags.BASELINES), on the device of `normalization`.

    names: persistence, ridge, switches, and those networks that are kept, unless given; `without` these
    minutes: how long a network trains; the longest that is kept, or else one, unless given

    Raises ConfigError if a baseline that was asked for does not fit the data set, and DataError if the data set has no
    training case with outputs. One that was not asked for is left out then, with a note.
    """
    found = Baselines()
    for name, title in TITLES.items():
        if name in without or (names is not None and name not in names):
            continue
        if name == "persistence":
            found.forecasters[title] = Persistence(store.schema.num_boundary)
            continue
        kind = KINDS[name]
        data = {"store": store.fingerprint, "normalization": digest(normalization)}
        about = {"format": _FORMAT, **data, "jitter": JITTER, **kind.about()}
        if isinstance(kind, Network):
            same = minutes_kept(store.root, name, about, found.notes)
            if names is None and not same:
                continue
            about["minutes"] = float(minutes or max(same, default=DEFAULT_MINUTES))
        try:
            found.forecasters[title], found.facts[title] = _one(
                name, kind, about, store, normalization, found.notes, progress
            )
        except ConfigError as error:
            if names is not None:
                raise
            found.notes.append(f"without {title}: {error}")
        else:
            said = kind.limits(store) if isinstance(kind, Linear) else _few_steps(title, found.facts[title]["steps"])
            found.notes.extend([said] if said else [])
    return found


def _few_steps(title: str, steps: int) -> str:
    if steps >= FEW_STEPS:
        return ""
    return f"{title}: trained for {steps} steps only, which makes it no fair comparison: raise --baseline-minutes"


def _one(
    name: str,
    kind: Linear | Network,
    about: dict[str, Any],
    store: Store,
    normalization: Normalization,
    notes: list[str],
    progress: bool,
) -> tuple[Forecaster, dict[str, Any]]:
    """A baseline from where it is kept, or else fitted and kept there; and the facts of its fit."""
    device = normalization.scale.device
    folder = folder_of(store.root, name, about)
    module = kind.empty(store, copy.deepcopy(normalization)).to(device)
    try:
        facts = kept(folder, about, module)
        if facts is not None:
            return module, facts
    except ValueError as error:
        notes.append(f"{folder}: {error}: {TITLES[name]} was fitted anew")
    began = time.perf_counter()
    for split in ("train", "val"):
        store.verify(array.name for array in store.arrays_of(split, store.cases(split)))
    budget = Budget(60 * about.get("minutes", math.inf))
    module, fit = kind.fit(store, copy.deepcopy(normalization), budget, device, progress)
    seconds = time.perf_counter() - began
    allowed = {"minutes": about["minutes"]} if "minutes" in about else {}
    facts = {**fit, **allowed, "seconds": seconds, "threads": torch.get_num_threads(), "device": device.type}
    try:
        keep(folder, about, module, facts)
    except (OSError, DataError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        note = f"{folder.parent}: cannot be written ({why}): baselines are fitted anew each time"
        notes.extend([note] if note not in notes else [])
    return module, facts
