"""A run's folder with an untrained decoder in it, as the engine leaves one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from trunkline.engine.checkpoint.weights import FINGERPRINT
from trunkline.models.fluid.config import FluidData, FluidModel
from trunkline.models.fluid.task import FluidTask

NETWORK = {
    "nodes": [{"name": "N_001", "x_km": 0.0, "y_km": 0.0}, {"name": "N_002", "x_km": 20.0, "y_km": 5.0}],
    "pipes": [{"name": "P_001", "from": "N_001", "to": "N_002"}],
    "devices": {
        "H": [],
        "B": [{"name": "B_001", "from": "N_001", "to": "N_002"}],
        "C": [],
        "R": [],
        "T": [{"name": "T_001", "node": "N_001"}],
        "E": [{"name": "E_001", "node": "N_002"}],
    },
}
MODEL: dict[str, Any] = {
    "d_model": 32,
    "num_heads": 2,
    "num_layers": 1,
    "d_ff": 32,
    "d_token": 16,
    "target": "change",
    "linear_skip": True,
}


def write_run(run: Path, store: Path, history: int = 3, **model: Any) -> FluidTask:
    """Write run/best/ for a store; returns the task. The head is zero: the model is the ridge autoregression."""
    (store / "network.json").write_text(json.dumps(NETWORK))
    data = FluidData(store=str(store), history=history)
    options = FluidModel(**{**MODEL, **model})
    task = FluidTask(data, options)
    torch.manual_seed(0)
    network = task.build_model()
    for parameter in network.projection.parameters():
        torch.nn.init.zeros_(parameter)
    best = run / "best"
    best.mkdir(parents=True)
    config: dict[str, Any] = {"workload": "fluid", "data": data.model_dump(), "model": options.model_dump()}
    config[FINGERPRINT] = task.fingerprint()
    for folder in (run, best):
        (folder / "config.json").write_text(json.dumps(config))
    task.save_assets(best)
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, best / "model.safetensors", {"step": "7"})
    return task
