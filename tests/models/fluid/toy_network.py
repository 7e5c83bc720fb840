"""A made-up network small enough to know everything about: linear, two set-points, every group of files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from trunkline.models.fluid.schema import GROUPS, MINUTES, Schema
from trunkline.models.fluid.store import Store
from trunkline.models.fluid.store_writer import write_store

SCHEMA = Schema(
    boundary=("T_001:SP", "E_001:SNQ"),
    groups={
        "B": ("B_001_p_in", "B_001_q_in"),
        "C": (),
        "H": ("H_001_t_out",),
        "N": ("N_001_p", "N_002_p"),
        "P": ("P_001_p_in", "P_001_inv"),
        "R": (),
        "T&E": ("E_001_q",),
    },
)
SCALE = np.array([0.5, 20.0, 3.0, 0.4, 0.4, 0.4, 1e4, 20.0])
OFFSET = np.array([5.0, 80.0, 15.0, 5.5, 5.2, 5.5, 1e6, 60.0])
_RNG = np.random.default_rng(0)
A = 0.9 * np.linalg.qr(_RNG.normal(size=(8, 8)))[0]
G = 0.3 * _RNG.normal(size=(8, 2))


def day(seed: int, minutes: int) -> tuple[np.ndarray, np.ndarray]:
    """(boundary [M, 2], state [M, 8]), float32, of  z(s+1) = A z(s) + G b(s+1); the boundary moves every 30 minutes."""
    rng = np.random.default_rng(seed)
    held = np.minimum(np.arange(1, minutes + 1) // 30, max(minutes // 30 - 1, 0))
    boundary = rng.normal(size=(minutes // 30 + 1, 2))[held]
    z = np.empty((minutes, 8))
    z[0] = rng.normal(size=8)
    for s in range(minutes - 1):
        z[s + 1] = A @ z[s] + G @ boundary[s + 1]
    return (boundary * [0.2, 10.0] + [5.0, 60.0]).astype(np.float32), (OFFSET + SCALE * z).astype(np.float32)


def write_toy_store(root: Path, minutes: int = 240, cases: tuple[int, int, int] = (6, 2, 2)) -> Store:
    """A store of toy days: `cases` for train, val and test; the last test case has no outputs."""
    splits: dict[str, dict[str, tuple[np.ndarray, np.ndarray | None]]] = {}
    seed = 0
    for split, count in zip(("train", "val", "test"), cases, strict=True):
        splits[split] = {}
        for number in range(count):
            splits[split][f"case_{number:04d}"] = day(seed := seed + 1, minutes)
    last = sorted(splits["test"])[-1]
    splits["test"][last] = (splits["test"][last][0], None)
    return write_store(root, SCHEMA, splits)


def write_toy_case(folder: Path, seed: int, outputs: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """A whole toy day as CSV files; returns its arrays."""
    boundary, state = day(seed, MINUTES)
    folder.mkdir(parents=True)
    rows = boundary[[max(30 * k - 1, 0) for k in range(48)]]
    times = [_time(30 * k) for k in range(48)]
    pl.DataFrame({"TIME": times, **dict(zip(SCHEMA.boundary, rows.T))}).write_csv(folder / "Boundary.csv")
    for group in GROUPS if outputs else ():
        values = dict(zip(SCHEMA.groups[group], state[:, SCHEMA.group_slices[group]].T))
        pl.DataFrame({"TIME": [_time(m) for m in range(1, MINUTES + 1)], **values}).write_csv(folder / f"{group}.csv")
    return boundary, state


def _time(minute: int) -> str:
    """The toy day is the last one of January."""
    month, day = (2, 1) if minute == MINUTES else (1, 31)
    return f"2025/{month}/{day} {minute // 60 % 24}:{minute % 60:02d}"
