"""The flags of launchers/train.py for this workload, and what it trains without a configuration file."""

from __future__ import annotations

from pathlib import Path

from trunkline.engine.config.flags import Flag

FLAGS = (
    Flag("store", "folder that launchers/prepare.py wrote", str, "data.store"),
    Flag("model-path", "folder with the weights that training starts from", str, "model.path"),
)
DEFAULTS = Path(__file__).parents[2] / "configs/causal_lm/tiny.json"
