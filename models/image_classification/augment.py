"""From stored images to what the network sees, on the device.

prepared(batch, data)     resized and normalised: evaluation, prediction
augmented(batch, data)    the same after what training does to an image, from batch["draw"]
"""

from __future__ import annotations

import torch
from torch import Tensor

from trunkline.engine.task import Batch
from trunkline.models.image_classification.config import ImageData


def prepared(batch: Batch, data: ImageData) -> Tensor:
    """fp32 [B, 3, S, S] from uint8 [B, H, W, 3]."""
    pixels = batch["image"].permute(0, 3, 1, 2).to(torch.float32) / 255
    mean, std = (torch.tensor(each, device=pixels.device).view(3, 1, 1) for each in (data.mean, data.std))
    return (pixels - mean) / std


def augmented(batch: Batch, data: ImageData) -> Tensor:
    """fp32 [B, 3, S, S] from uint8 [B, H, W, 3]."""
    return prepared(batch, data)
