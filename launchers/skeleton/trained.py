"""A trained model from a run's folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from trunkline.engine.checkpoint.trained import trained_sections
from trunkline.engine.checkpoint.weights import load_weights
from trunkline.launchers.skeleton.config import Data, Model
from trunkline.launchers.skeleton.task import SkeletonTask


def load_trained(run: Path, device: torch.device) -> tuple[SkeletonTask, nn.Module]:
    """The task, and its model with the best weights. Raises CheckpointError or ConfigError."""
    folder, data, section = trained_sections(run, "skeleton", Data, Model)
    task = SkeletonTask(data, section)
    model = task.build_model()
    load_weights(model, folder)
    return task, model.to(device).eval()
