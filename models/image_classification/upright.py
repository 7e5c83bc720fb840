"""Parts of images as squares, where nothing is turned: what Pillow makes of them, antialiased, to within 1 of 255.

It is ten times as fast on a CPU as sampling at the places of a grid, which a rotation needs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def upright(images: Tensor, corner: Tensor, size: Tensor, mirrored: Tensor, edge: int) -> Tensor:
    """uint8 [B, 3, edge, edge] from uint8 [B, H, W, 3], on the CPU.

    corner, size: int64 [B, 2], x and y of the part's upper left corner, and its width and height
    mirrored: bool [B], whether left and right change places
    """
    found = torch.empty(len(images), 3, edge, edge, dtype=torch.uint8)
    parts = zip(images, corner.tolist(), (corner + size).tolist(), mirrored.tolist(), found, strict=True)
    for image, (left, upper), (right, lower), is_mirrored, out in parts:
        part = image[None, upper:lower, left:right].permute(0, 3, 1, 2)
        square = F.interpolate(part, size=(edge, edge), mode="bilinear", antialias=True)[0]
        out.copy_(square.flip(2) if is_mirrored else square)
    return found
