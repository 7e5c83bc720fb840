"""A small network beside a ridge autoregression, trained for a given time: what the baselines with a network share.

    state(s+1) = ridge(window) + unit * network(features),  unit^2 = change^2 + noise^2    in normalised units

    Corrected                          ridge and network as one forecaster
    train(...)                         fits both on the training split; the best weights by validation rollouts

The network is trained as the surrogate is: one minute ahead, with noise on the input states that the target leads back
from, errors in units; AdamW with a cosine from a short warm-up to zero, and an exponential average of the weights,
which is what is validated and kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from trunkline.models.fluid.baselines.linear import DAY, LinearAutoregression, rollout_error
from trunkline.models.fluid.normalization import Normalization
from trunkline.models.fluid.ridge import JITTER, Features, NormalEquations, two_minutes
from trunkline.models.fluid.schema import Schema
from trunkline.models.fluid.store import Store

HISTORY = 2
RIDGE_PENALTY = 1e-6
_WARM_UP = 0.02
_VALIDATED_AT = (0.4, 0.55, 0.7, 0.8, 0.9, 1.0)  # shares of the budget
_MOST_VALUES = 512 << 20  # of the training days in memory, 2 GiB


@dataclass(frozen=True)
class Settings:
    """How a network is trained.

    noise: deviation of that on the input states, in normalised units; ridge_noise: the same for the ridge beside it
    average: decay of the weights' average at each step
    """

    width: int
    learning_rate: float
    weight_decay: float
    noise: float = 0.1
    ridge_noise: float = 0.03
    batch_size: int = 256
    average: float = 0.999
    seed: int = 42


@dataclass(frozen=True)
class Budget:
    """How long a network trains: seconds on the clock, or, for the same weights again, steps.

    The clock runs during validation, but not yet while the ridge is fitted and the days are loaded.
    """

    seconds: float = math.inf
    steps: float = math.inf

    def spent(self, since: float, step: int) -> float:
        """The share of it that is spent, 0 to 1 and more."""
        return max((time.perf_counter() - since) / self.seconds, step / self.steps)


def features_of(schema: Schema) -> Features:
    """What ridge and network see: [boundary(s+1), state(s), state(s-1)].

    Not boundary(s), which helps a linear autoregression: beside noise on the states a network leans on it. On the
    demo's validation days it gained nothing at a minute, and RMSE over a day was .188 with it and .161 without.
    """
    return Features.of_states(schema.num_boundary, schema.num_states)


class Corrected(nn.Module):
    """A ridge autoregression and a network over the same features, [B, F] -> [B, Vs], as a forecaster."""

    history = HISTORY
    unit: Tensor

    def __init__(self, normalization: Normalization, features: Features, network: nn.Module, noise: float) -> None:
        super().__init__()
        self.normalization, self.network = normalization, network
        self.ridge = LinearAutoregression(normalization, features)
        self.register_buffer("unit", (normalization.change.square() + noise**2).sqrt())

    def forward(self, window: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised windows [B, T, V] -> what the ridge says, normalised, and the correction in units; [B, Vs]."""
        z = two_minutes(window[:, -2:], self.normalization.num_boundary)[:, -1]
        return self.ridge.next(z), self.network(z[:, : self.ridge.features.plain])

    @torch.no_grad()
    def next_state(self, window: Tensor) -> Tensor:
        base, correction = self(self.normalization.normalize(window))
        return self.normalization.restore_states(base + self.unit * correction)


def train(
    store: Store,
    normalization: Normalization,
    make_network: Callable[[], nn.Module],
    settings: Settings,
    budget: Budget,
    device: torch.device,
    progress: bool = False,
) -> tuple[Corrected, dict[str, float]]:
    """The forecaster with the best weights by rollouts of the whole validation days, and facts of the training.

    make_network: called once, with torch's generators seeded

    Two calls with the same number of steps give the same weights. Without validation cases the last ones are taken.

    Raises DataError if no training case has outputs.
    """
    features = features_of(store.schema)
    equations = NormalEquations.over_training_split(store, normalization, features)
    with _seeded(settings.seed):
        model = Corrected(normalization, features, make_network(), settings.noise).to(device)
    model.ridge.take(equations, RIDGE_PENALTY, settings.ridge_noise)
    days = _training_days(store, normalization, device)
    draw = torch.Generator(device).manual_seed(settings.seed)
    parameters = list(model.network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True)
    averaged = AveragedModel(model.network, multi_avg_fn=get_ema_multi_avg_fn(settings.average))
    best: dict[str, Tensor] = {}
    best_error, best_step, step = math.inf, 0, 0
    due, validation_s = list(_VALIDATED_AT), 0.0
    since = time.perf_counter()
    bar = tqdm(total=100, desc="training", unit="%", disable=not progress, leave=False)
    while due:
        spent = budget.spent(since - validation_s, step)
        bar.update(min(100, int(100 * spent)) - bar.n)
        if spent >= due[0]:
            while due and spent >= due[0]:
                due.pop(0)
            began = time.perf_counter()
            trained, model.network = model.network, averaged.module
            error = rollout_error(store, model, DAY, normalization, device)
            if error <= best_error:
                best, best_error, best_step = _copy(averaged.module), error, step
            model.network = trained
            validation_s = time.perf_counter() - began
            continue
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, spent / _WARM_UP) * _cosine(spent)
        loss = _loss(model, days, settings, draw)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        averaged.update_parameters(model.network)
        step += 1
    bar.close()
    model.network.load_state_dict(best)
    return model.eval(), {"steps": step, "best_step": best_step, "days": len(days), "validation_mse": best_error}


def _loss(model: Corrected, days: Tensor, settings: Settings, draw: torch.Generator) -> Tensor:
    """Mean squared error in units over a batch of windows drawn from `days` [D, M, V], where targets are present."""
    num_boundary = model.normalization.num_boundary
    places = (settings.batch_size, 1)
    case = torch.randint(len(days), places, generator=draw, device=days.device)
    last = torch.randint(HISTORY - 1, days.shape[1] - 1, places, generator=draw, device=days.device)
    minutes = last + torch.arange(1 - HISTORY, 1, device=days.device)
    target = days[case[:, 0], last[:, 0] + 1, num_boundary:]
    states = days[case, minutes][..., num_boundary:].nan_to_num()
    drift = torch.empty_like(states[:, :1]).normal_(generator=draw)
    states = states + settings.noise * (drift + JITTER * torch.empty_like(states).normal_(generator=draw))
    base, correction = model(torch.cat([days[case, minutes + 1][..., :num_boundary], states], dim=-1))
    error = correction - (target - base) / model.unit
    present = ~target.isnan()
    return error.masked_fill(~present, 0).square().sum() / present.sum().clamp(min=1)


def _training_days(store: Store, normalization: Normalization, device: torch.device) -> Tensor:
    """Training days with outputs, normalised, [D, M, V], NaN where missing: all, or as many as fit, evenly spaced."""
    cases = [case for case in store.cases("train") if store.has_state("train", case)]
    fit = min(len(cases), max(1, _MOST_VALUES // (store.minutes * store.schema.num_variables)))
    days = torch.empty(fit, store.minutes, store.schema.num_variables, device=device)
    for day, place in zip(days, np.linspace(0, len(cases) - 1, fit).round().astype(int), strict=True):
        state = np.asarray(store.state("train", cases[place]))
        raw = torch.from_numpy(np.concatenate([store.boundary("train", cases[place]), state], axis=1)).to(device)
        day.copy_((raw - normalization.offset) / normalization.scale)
    return days


def _cosine(share: float) -> float:
    return (1 + math.cos(math.pi * min(share, 1.0))) / 2


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
