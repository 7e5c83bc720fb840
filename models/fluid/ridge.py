"""Ridge autoregression: the linear answer to the surrogate's question, in closed form.

    state(s+1) - state(s)  =  W features + b      features of [boundary(s+1), state(s), state(s-1), boundary(s)]

in normalised units. It is a baseline of every evaluation and, as an option, the linear skip of the decoder. The normal
equations are summed over the training cases one at a time, in fp64; `Features.fit_bytes` is what that takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.sparse
import torch
from torch import Tensor
from tqdm import tqdm

from trunkline.engine.errors import DataError
from trunkline.models.fluid.normalization import Fp32Buffers, Normalization
from trunkline.models.fluid.schema import Schema, parse_column
from trunkline.models.fluid.store import Store

_ROWS_PER_FEATURE = 4  # a network of thousands of variables is fitted on evenly spaced minutes, not on all of them
_LEAST_ROWS = 200_000
SWITCHES = ("ST", "FR")
MOST_BYTES = 6 << 30
JITTER = 1 / 3
"""Noise on the input states is a drift common to a window's minutes plus this share of it on each minute alone."""


@dataclass(frozen=True, eq=False)
class Features:
    """What a linear autoregression sees of z = [boundary(s+1), state(s), state(s-1), boundary(s)], normalised.

    plain: how many of z's columns, from the first, are features themselves: P
    first, second: int64 [J]; the other features are z[first] * z[second]; first is one of P, of the boundary
    """

    plain: int
    first: np.ndarray
    second: np.ndarray

    @classmethod
    def columns(cls, count: int) -> Features:
        """The first `count` columns of z, without products."""
        none = np.empty(0, dtype=np.int64)
        return cls(count, none, none)

    @classmethod
    def of_states(cls, num_boundary: int, num_states: int) -> Features:
        """boundary(s+1), state(s) and state(s-1)."""
        return cls.columns(num_boundary + 2 * num_states)

    @classmethod
    def with_products(cls, schema: Schema, multipliers: Sequence[int], own: bool) -> Features:
        """All columns, and each times each of these set-points (places in the boundary), at minutes s+1 and s.

        own: a set-point is multiplied with the columns of its own device alone, in which what it does is felt first
        """
        columns = 2 * schema.num_variables
        former = columns - schema.num_boundary  # where boundary(s) begins
        first, second = np.mgrid[: 2 * len(multipliers), :columns].reshape(2, -1)
        first = np.array([*multipliers, *(former + k for k in multipliers)], dtype=np.int64)[first]
        if own:
            devices = np.array([parse_column(name)[0] for name in (*schema.columns, *schema.states, *schema.boundary)])
            same = devices[first] == devices[second]
            first, second = first[same], second[same]
        return cls(columns, first, second)

    def __len__(self) -> int:
        return self.plain + len(self.first)

    def fit_bytes(self, num_states: int) -> int:
        """What a process needs to fit them: gram, its copies while it is solved, and the sums with the changes."""
        return 8 * len(self) * (4 * len(self) + 2 * num_states)

    def of(self, z: np.ndarray) -> np.ndarray:
        """[rows, 2 V] -> [rows, F]."""
        return np.concatenate([z[:, : self.plain], z[:, self.first] * z[:, self.second]], axis=1)


def switches(schema: Schema) -> list[int]:
    """Places in the boundary of the set-points that are switches: a station is on, a valve is open."""
    return [k for k, name in enumerate(schema.boundary) if parse_column(name)[1] in SWITCHES]


class RidgeAutoregression(Fp32Buffers):
    """W [Vs, F] and b [Vs] as fp32 buffers: fitted, not trained."""

    weight: Tensor
    bias: Tensor
    first: Tensor
    second: Tensor

    def __init__(self, num_boundary: int, num_states: int, features: Features) -> None:
        super().__init__()
        self.num_boundary, self.features = num_boundary, features
        self.register_buffer("weight", torch.zeros(num_states, len(features), dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(num_states, dtype=torch.float32))
        self.register_buffer("first", torch.from_numpy(features.first), persistent=False)
        self.register_buffer("second", torch.from_numpy(features.second), persistent=False)

    def forward(self, normalised: Tensor) -> Tensor:
        """Windows [B, T, V] -> next states [B, T, Vs], both normalised.

        The first minute of a window has none before it. It is taken as its own, as if nothing had moved.
        """
        return self.next(two_minutes(normalised, self.num_boundary))

    def next(self, z: Tensor) -> Tensor:
        """What `two_minutes` gives, [..., 2 V] -> next states [..., Vs]."""
        features = z[..., : self.features.plain]
        if len(self.first):
            features = torch.cat([features, z[..., self.first] * z[..., self.second]], dim=-1)
        states = z[..., self.num_boundary : self.num_boundary + len(self.bias)]
        with torch.autocast(z.device.type, enabled=False):
            return states + features @ self.weight.T + self.bias

    def take(self, equations: NormalEquations, penalty: float, noise: float = 0.0) -> None:
        """Take the solution for this penalty and noise on the input states; see `NormalEquations.coefficients`."""
        weight, bias = equations.coefficients(penalty, noise, self.num_boundary)
        self.weight.copy_(torch.from_numpy(weight))
        self.bias.copy_(torch.from_numpy(bias))


def two_minutes(normalised: Tensor, num_boundary: int) -> Tensor:
    """Windows [B, T, V] -> [B, T, 2 V]: boundary(s+1), state(s), state(s-1), boundary(s) of each minute s."""
    before = torch.cat([normalised[:, :1], normalised[:, :-1]], dim=1)
    return torch.cat([normalised, before[..., num_boundary:], before[..., :num_boundary]], dim=-1)


@dataclass(frozen=True)
class NormalEquations:
    """Centred sums over minutes: gram [F, F] of the features, cross [F, Vs] with the changes, and both means; fp64."""

    features: Features
    gram: np.ndarray
    cross: np.ndarray
    feature_mean: np.ndarray
    change_mean: np.ndarray
    rows: int

    @classmethod
    def over_training_split(
        cls,
        store: Store,
        normalization: Normalization,
        features: Features,
        progress: bool = False,
    ) -> NormalEquations:
        """Sum over the training cases that have outputs. A missing value counts as its offset, its change as 0.

        Raises DataError if no training case has outputs.
        """
        cases = [case for case in store.cases("train") if store.has_state("train", case)]
        if not cases:
            raise DataError(f"{store.root}: no training case has outputs, so no autoregression can be fitted")
        num_boundary, num_states = store.schema.num_boundary, store.schema.num_states
        num_features = len(features)
        columns = np.r_[: num_boundary + num_states, num_boundary : num_boundary + num_states, :num_boundary]
        offset, scale = (x.double().cpu().numpy() for x in (normalization.offset, normalization.scale))
        stride = max(1, len(cases) * store.minutes // max(_LEAST_ROWS, _ROWS_PER_FEATURE * num_features))
        gram, cross = np.zeros((num_features, num_features)), np.zeros((num_features, num_states))
        feature_sum, change_sum, rows = np.zeros(num_features), np.zeros(num_states), 0
        for case in tqdm(cases, desc="ridge", unit="case", disable=not progress, leave=False):
            state = np.asarray(store.state("train", case))
            boundary = np.asarray(store.boundary("train", case))
            now = np.arange(1 + rows % stride, store.minutes - 1, stride)
            z = np.concatenate([boundary[now + 1], state[now], state[now - 1], boundary[now]], axis=1, dtype=np.float64)
            z = features.of(np.nan_to_num((z - offset[columns]) / scale[columns], copy=False))
            change = (state[now + 1].astype(np.float64) - state[now]) / scale[num_boundary:]
            change = np.nan_to_num(change, copy=False)
            gram += z.T @ z
            cross += z.T @ change
            feature_sum += z.sum(0)
            change_sum += change.sum(0)
            rows += len(now)
        feature_mean, change_mean = feature_sum / rows, change_sum / rows
        gram -= rows * np.outer(feature_mean, feature_mean)
        cross -= rows * np.outer(feature_mean, change_mean)
        return cls(features, gram, cross, feature_mean, change_mean, rows)

    def coefficients(self, penalty: float, noise: float, num_boundary: int) -> tuple[np.ndarray, np.ndarray]:
        """(W [Vs, F], b [Vs]), the minimiser of (squared error + penalty |W|^2) per minute.

        noise: fit as if normal noise of this standard deviation (normalised units) stood on the input states, the
        same on both minutes, and a third of it on each alone, and the target led back to the truth; its expectation is
        added in closed form.
        """
        gram, cross = self.gram.copy(), self.cross
        gram.ravel()[:: len(gram) + 1] += penalty * self.rows
        if noise:
            # noise on a feature m * x, where m is 1 or a set-point: its covariance with that on m' * x' is
            # E[m m'] cov(noise on x, noise on x')
            multipliers = np.unique(self.features.first)
            mean = np.r_[1.0, self.feature_mean[multipliers]]
            moments = self.rows * np.outer(mean, mean)
            moments[1:, 1:] += self.gram[np.ix_(multipliers, multipliers)]
            which = np.r_[np.zeros(self.features.plain, int), 1 + np.searchsorted(multipliers, self.features.first)]
            column = np.r_[: self.features.plain, self.features.second]
            covariance = _noise_covariance(num_boundary, len(self.change_mean), noise)[column]
            pairs = covariance[:, column].tocoo()
            gram[pairs.row, pairs.col] += moments[which[pairs.row], which[pairs.col]] * pairs.data
            pairs = covariance[:, num_boundary : num_boundary + len(self.change_mean)].tocoo()
            cross = cross.copy()
            cross[pairs.row, pairs.col] -= moments[which[pairs.row], 0] * pairs.data
        factor = scipy.linalg.cho_factor(gram, overwrite_a=True, check_finite=False)
        weight = scipy.linalg.cho_solve(factor, cross, check_finite=False)
        return weight.T, self.change_mean - self.feature_mean @ weight


def _noise_covariance(num_boundary: int, num_states: int, noise: float) -> scipy.sparse.csr_array:
    """[2 V, 2 V] of the noise on z: none on the boundary."""
    shared, alone = noise**2, (JITTER * noise) ** 2
    states = scipy.sparse.kron([[shared + alone, shared], [shared, shared + alone]], scipy.sparse.eye_array(num_states))
    boundary = scipy.sparse.csr_array((num_boundary, num_boundary))
    return scipy.sparse.block_diag([boundary, states, boundary], format="csr")
