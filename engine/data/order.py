"""The order of samples: a pure function of (seed, epoch).

There is nothing to store and nothing to replay.

Global batch k holds the same samples on any number of ranks. Position -> sample is a keyed bijection: a Feistel
network over Z_a x Z_b with a b just above the data set's size, walked until it falls inside (Black and Rogaway,
"Ciphers with arbitrary finite domains", 2002). Any position costs O(1), so resuming at any
step does too, and no permutation of a large data set is ever held in memory.

Where the samples' lengths are given, a batch holds samples of about one length. The samples of every 50 batches in a
row are sorted by length and cut into batches again, and these are shuffled. Any step costs what 50 batches do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from trunkline.engine.data.randomness import finalise_array, mix, mix_last
from trunkline.engine.errors import ConfigError
from trunkline.engine.task import Samples

FILLER = -1
"""Stands in a short last batch where there is no sample: the engine gives such places weight zero."""

_ROUNDS = 6


def permuted(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """The samples at these positions of the order that `key` names: int64 [...], a bijection of range(size)."""
    left_size = math.isqrt(max(size - 1, 0)) + 1
    right_size = -(-size // left_size)  # left_size * right_size is hardly larger than size, so walks are rare
    round_keys = np.array([mix(key, turn) & 0xFFFFFFFFFFFFFFFF for turn in range(_ROUNDS)], dtype=np.uint64)
    out = positions.astype(np.uint64)
    todo = out >= 0
    while todo.any():
        left, right = np.divmod(out[todo], np.uint64(right_size))
        for even, odd in round_keys.reshape(-1, 2):
            left = (left + finalise_array(right + even) % np.uint64(left_size)) % np.uint64(left_size)
            right = (right + finalise_array(left + odd) % np.uint64(right_size)) % np.uint64(right_size)
        out[todo] = left * np.uint64(right_size) + right
        todo = out >= size
    return out.astype(np.int64)


@dataclass(frozen=True, eq=False)
class GlobalBatches:
    """The global batches of a run, by optimizer step. An epoch's last batch may be short; no sample is left out.

    lengths: int64 [num_samples], by which samples are grouped; None where they are not
    """

    num_samples: int
    global_batch_size: int
    seed: int
    lengths: np.ndarray | None = field(default=None, repr=False)

    @property
    def per_epoch(self) -> int:
        """Optimizer steps an epoch."""
        return -(-self.num_samples // self.global_batch_size)

    def epoch(self, step: int) -> int:
        """The epoch that step `step` (from 0) belongs to."""
        return step // self.per_epoch

    def count(self, step: int) -> int:
        """How many samples step `step` (from 0) has; fewer than a global batch where it is an epoch's last one."""
        return min(self.global_batch_size, self.num_samples - step % self.per_epoch * self.global_batch_size)

    def samples(self, step: int) -> np.ndarray:
        """The samples of step `step` (from 0): int64 [global_batch_size], with FILLER at the end of a short batch."""
        return self.draws(step)[0]

    def draws(self, step: int) -> np.ndarray:
        """The samples of a step, and the key of each one's draw in this epoch: int64 [2, global_batch_size]."""
        epoch, batch = divmod(step, self.per_epoch)
        if self.lengths is None:
            drawn = self._in_order(epoch, batch * self.global_batch_size, (batch + 1) * self.global_batch_size)
        else:
            group, place = divmod(batch, _GROUPED)
            start = place * self.global_batch_size
            drawn = _group(self, epoch, group)[:, start : start + self.global_batch_size]
        out = np.full((2, self.global_batch_size), FILLER, dtype=np.int64)
        out[:, : drawn.shape[1]] = drawn
        return out

    def _in_order(self, epoch: int, first: int, last: int) -> np.ndarray:
        """Samples and keys at places `first` ... `last` - 1 of an epoch's order, as far as there are: int64 [2, n]."""
        last = min(last, self.num_samples)
        blocks = [
            _block(self.num_samples, self.seed, epoch, block) for block in range(first // _BLOCK, -(-last // _BLOCK))
        ]
        drawn = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)
        return drawn[:, first % _BLOCK :][:, : last - first]

    def heaviest(self, step: int, lengths: np.ndarray | None) -> int:
        """The largest of the lengths [N] of a step's samples, which every rank knows of all; 0 where they are alike."""
        if lengths is None:
            return 0
        samples = self.samples(step)
        return int(lengths[samples[samples != FILLER]].max())


def lengths_of(dataset: Samples) -> np.ndarray | None:
    """How much there is of each sample, int64 [N]; None where the data set does not say. Raises ConfigError."""
    given = getattr(dataset, "lengths", None)
    if given is None:
        return None
    lengths = np.asarray(given)
    if lengths.shape != (len(dataset),) or lengths.dtype.kind not in "iu":
        raise ConfigError(
            f"{type(dataset).__name__}.lengths: expected an integer for each sample, int64 [{len(dataset)}], found "
            f"{lengths.dtype} {list(lengths.shape)}: correct it, or give the attribute another name"
        )
    return lengths.astype(np.int64, copy=False)


_BLOCK = 8192


@lru_cache(maxsize=8)
def _block(size: int, seed: int, epoch: int, block: int) -> np.ndarray:
    # a block at a time, because numpy's cost a call would outweigh that of a small batch
    order = permuted(np.arange(block * _BLOCK, min((block + 1) * _BLOCK, size)), size, mix(seed, epoch))
    return np.stack([order, mix_last(order, seed, epoch)])


_GROUPED = 50


@lru_cache(maxsize=2)
def _group(batches: GlobalBatches, epoch: int, group: int) -> np.ndarray:
    """Samples and keys of _GROUPED batches in a row, grouped by length. A short last batch stays as it was drawn."""
    assert batches.lengths is not None
    size = batches.global_batch_size
    drawn = batches._in_order(epoch, group * _GROUPED * size, (group + 1) * _GROUPED * size)
    count = drawn.shape[1] // size
    whole, rest = np.split(drawn, [count * size], axis=1)
    whole = whole[:, np.argsort(-batches.lengths[whole[0]], kind="stable")].reshape(2, count, size)
    shuffled = permuted(np.arange(count), count, mix(batches.seed, epoch, group))
    return np.concatenate([whole[:, shuffled].reshape(2, -1), rest], axis=1)
