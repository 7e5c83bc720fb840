"""A made-up network with a switch: a station that is on or off, and another linear law in each of the two."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from trunkline.models.fluid.schema import Schema
from trunkline.models.fluid.store import Store
from trunkline.models.fluid.store_writer import write_store

SCHEMA = Schema(
    boundary=("C_001:ST", "E_001:SNQ"),
    groups={
        "B": (), "C": ("C_001_q",), "H": (), "N": ("N_001_p", "N_002_p", "N_003_p"), "P": ("P_001_inv",), "R": (),
        "T&E": ("E_001_q",),
    },
)  # fmt: skip
NETWORK = {
    "pipes": [{"name": "P_001", "from": "N_002", "to": "N_003"}],
    "devices": {
        "C": [{"name": "C_001", "from": "N_001", "to": "N_002"}],
        "E": [{"name": "E_001", "node": "N_003"}],
        "T": [{"name": "T_001", "node": "N_001"}],  # which has no column
    },
}
_RNG = np.random.default_rng(0)
LAWS = [0.9 * np.linalg.qr(_RNG.normal(size=(6, 6)))[0] for _ in range(2)]
G = 0.3 * _RNG.normal(size=(6, 2))


def switched_day(seed: int, minutes: int = 240) -> tuple[np.ndarray, np.ndarray]:
    """(boundary [M, 2], state [M, 6]) of  z(s+1) = A[switch(s+1)] z(s) + G b(s+1)."""
    rng = np.random.default_rng(seed)
    held = np.arange(minutes) // 20
    switch = rng.integers(0, 2, size=held[-1] + 1)[held]
    boundary = np.stack([switch, rng.normal(size=held[-1] + 1)[held]], axis=1)
    z = np.empty((minutes, 6))
    z[0] = rng.normal(size=6)
    for s in range(minutes - 1):
        z[s + 1] = LAWS[switch[s + 1]] @ z[s] + G @ boundary[s + 1]
    return boundary.astype(np.float32), (5 + z).astype(np.float32)


def write_switched_store(root: Path) -> Store:
    """Six training days, two of validation, one of test; and network.json."""
    days = iter(range(9))
    splits = {
        split: {f"case_{k}": switched_day(next(days)) for k in range(count)}
        for split, count in (("train", 6), ("val", 2), ("test", 1))
    }
    root.mkdir(parents=True, exist_ok=True)
    (root / "network.json").write_text(json.dumps(NETWORK))
    return write_store(root, SCHEMA, splits)
