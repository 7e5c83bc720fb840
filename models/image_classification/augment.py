"""From stored images to what the network sees, on the device.

prepared(batch, data)     the central square, resized and normalised: evaluation, prediction
augmented(batch, data)    the same after what training does to an image, from batch["draw"]

An image that is img_size square is seen as it is. Of any other the central square, as large as the shorter side, is
resized. Training may take a random part in its place (torchvision's RandomResizedCrop), and flips and rotates it. All
of this is one affine map, and the image is sampled once, bilinearly. There is no low-pass filter: the short side of a
store should be at most twice img_size. What lies outside the image is black, as torchvision's rotation has it. On a CPU
a random part that is not rotated is resized as by Pillow, with such a filter, which is quicker there.

Then colours change as in torchvision's ColorJitter, in the order brightness, contrast, saturation, hue. (There the
order is drawn as well, which changes little.)

What is drawn for an image depends on its draw alone, and what becomes of it on nothing else in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from trunkline.engine.data.randomness import uniform
from trunkline.engine.task import Batch
from trunkline.models.image_classification.config import Augmentation, Crop, ImageData
from trunkline.models.image_classification.upright import upright

PLACE, COLOUR, PART, MIXED = range(4)
"""The streams of a draw: flip and rotation, colours, the random part, mixup's share."""

_TRIES = 10
_STEPS = 4096  # coordinates are multiples of 1 / 4,096 of a pixel, which grid_sample computes with exactly
_AT_A_TIME = 1 << 19  # pixels
_LUMA = (0.2989, 0.587, 0.114)


def prepared(batch: Batch, data: ImageData) -> Tensor:
    """fp32 [B, 3, S, S] from uint8 [B, H, W, 3]."""

    def pixels(batch: Batch) -> Tensor:
        part = central_part(batch["size"])
        unturned = torch.eye(2, device=part.size.device).expand(len(part.size), 2, 2)
        return sampled(batch, data.img_size, part, unturned, is_upright=True)

    return _normalised(pixels, batch, data)


def augmented(batch: Batch, data: ImageData) -> Tensor:
    """fp32 [B, 3, S, S] from uint8 [B, H, W, 3]."""
    options = data.augmentation

    def pixels(batch: Batch) -> Tensor:
        draw, size = batch["draw"], batch["size"]
        part = central_part(size) if options.crop is None else random_part(draw, size, options.crop)
        turn = turned(draw, options)
        if options.crop is not None and not options.rotate and draw.device.type == "cpu":
            corner = (part.centre - part.size / 2).long()
            square = upright(batch["image"], corner, part.size.long(), turn[:, 0, 0] < 0, data.img_size)
            seen = square.float().div_(255)
        else:
            seen = sampled(batch, data.img_size, part, turn, is_upright=not options.rotate)
        return jittered(seen, draw, options)

    return _normalised(pixels, batch, data)


def _normalised(pixels: Callable[[Batch], Tensor], batch: Batch, data: ImageData) -> Tensor:
    """On a CPU a few images at a time, in memory that is used again: fresh memory costs more than all arithmetic."""
    count, edge, device = len(batch["image"]), data.img_size, batch["image"].device
    few = max(1, _AT_A_TIME // edge**2) if device.type == "cpu" else count
    mean, std = (torch.tensor(each, device=device).view(3, 1, 1) for each in (data.mean, data.std))
    seen = torch.empty(count, 3, edge, edge, device=device)
    for first in range(0, count, few):
        these = slice(first, first + few)
        torch.sub(pixels({key: value[these] for key, value in batch.items()}), mean, out=seen[these]).div_(std)
    return seen


class Part(NamedTuple):
    """A rectangle of each image, in pixels from its upper left corner: centre and size, fp32 [B, 2], x and y."""

    centre: Tensor
    size: Tensor


def random_part(draw: Tensor, size: Tensor, crop: Crop) -> Part:
    """As torchvision's RandomResizedCrop: of ten tries the first that fits, else the largest central part whose width
    over height is allowed. `size` [B, 2] is height and width."""
    numbers = uniform(draw, (_TRIES + 1, 2), stream=PART).double()
    height, width = size.double().unbind(1)
    area = (height * width)[:, None] * _between(*crop.scale, numbers[:, :-1, 0])
    ratio = _between(math.log(crop.ratio[0]), math.log(crop.ratio[1]), numbers[:, :-1, 1]).exp()
    tried_w, tried_h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (tried_w > 0) & (tried_w <= width[:, None]) & (tried_h > 0) & (tried_h <= height[:, None])
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    found = fits.any(dim=1)
    w = torch.where(found, tried_w.gather(1, first)[:, 0], torch.minimum(width, (height * crop.ratio[1]).round()))
    h = torch.where(found, tried_h.gather(1, first)[:, 0], torch.minimum(height, (width / crop.ratio[0]).round()))
    free = torch.stack([width - w, height - h], dim=1)
    corner = torch.where(found[:, None], (numbers[:, -1] * (free + 1)).floor(), (free / 2).round())
    part = torch.stack([w, h], dim=1)
    return Part((corner + part / 2).float(), part.float())


def _between(low: float, high: float, share: Tensor) -> Tensor:
    return low + (high - low) * share


def central_part(size: Tensor) -> Part:
    """The square in the middle, as large as the shorter side. `size` [B, 2] is height and width."""
    shorter = size.min(dim=1, keepdim=True).values.float()
    return Part(size.flip(1).float() / 2, shorter.expand(-1, 2))


def turned(draw: Tensor, options: Augmentation) -> Tensor:
    """[B, 2, 2]: from a direction in the augmented image, x and y, to the one in the image that it shows."""
    flip, turn = uniform(draw, (2,), stream=PLACE).unbind(1)
    angle = (2 * turn - 1) * math.radians(options.rotate)
    mirrored = torch.where(flip < options.flip, -1.0, 1.0)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([mirrored * cos, -mirrored * sin, sin, cos], dim=1).view(-1, 2, 2)


def sampled(batch: Batch, edge: int, part: Part, turn: Tensor, is_upright: bool = False) -> Tensor:
    """fp32 [B, 3, edge, edge] in 0 ... 1: the part, turned about its centre, of each image.

    is_upright: no image is turned by an angle, so rows stay rows, and no place lies outside

    grid_sample takes places as fractions of the padded image. Where its edges are powers of two, multiples of 1 / 4,096
    of a pixel are exact: so the result does not depend on the padding, and a pixel that is hit is copied.
    """
    images = batch["image"]
    height, width = images.shape[1:3]
    padded_w, padded_h = (1 << max(0, length - 1).bit_length() for length in (width, height))
    canvas = torch.empty(len(images), padded_h, padded_w, 3, device=images.device)
    canvas[:, :height, :width] = images
    canvas[:, height : height + 1] = 0  # the last row and column take what lies behind them with a weight of 0
    canvas[:, :, width : width + 1] = 0
    along = torch.arange(edge, device=images.device) + 0.5 - edge / 2
    offsets = (along.view(1, 1, -1), along.view(1, -1, 1))
    steps = turn * (part.size / edge * _STEPS)[:, :, None]
    start = (part.centre - 0.5) * _STEPS
    grid = torch.empty(len(images), edge, edge, 2, device=images.device)
    outside = []
    for axis, padded in enumerate((padded_w, padded_h)):
        place = start[:, axis].view(-1, 1, 1)
        for k in (axis,) if is_upright else (0, 1):
            place = place + steps[:, axis, k].view(-1, 1, 1) * offsets[k]
        last = ((batch["size"][:, 1 - axis] - 1) * _STEPS).float().view(-1, 1, 1)
        nearest = torch.minimum(place.round_().clamp(min=0), last)
        outside.append(place.sub_(nearest).abs_())
        grid[..., axis] = nearest.mul_(2 / (padded * _STEPS)).add_(1 / padded - 1)
    found = F.grid_sample(canvas.permute(0, 3, 1, 2), grid, align_corners=False).div_(255)
    return found if is_upright else found.mul_((torch.maximum(*outside) <= _STEPS / 2)[:, None])


def jittered(pixels: Tensor, draw: Tensor, options: Augmentation) -> Tensor:
    """[B, 3, S, S] in 0 ... 1 with other colours, in place: each step ends within 0 ... 1."""
    widths = (options.brightness, options.contrast, options.saturation, options.hue)
    brightness, contrast, saturation, hue = (
        (width * (2 * number - 1)).view(-1, 1, 1, 1)
        for width, number in zip(widths, uniform(draw, (4,), stream=COLOUR).unbind(1), strict=True)
    )
    if options.brightness:
        pixels.mul_(1 + brightness).clamp_(0, 1)
    if options.contrast:
        mean = _grey(pixels).mean(dim=(1, 2, 3), keepdim=True, dtype=torch.float64).float()
        pixels.mul_(1 + contrast).sub_(contrast * mean).clamp_(0, 1)
    if options.saturation:
        grey = _grey(pixels)
        pixels.mul_(1 + saturation).sub_(saturation * grey).clamp_(0, 1)
    if options.hue:
        _turn_hue(pixels, 6 * hue[:, 0])
    return pixels


def _grey(pixels: Tensor) -> Tensor:
    """[B, 1, S, S]: as bright as the colours are."""
    red, green, blue = pixels.split(1, dim=1)
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2])


def _turn_hue(pixels: Tensor, sixths: Tensor) -> None:
    """Turn the hue of HSV by sixths of the circle, [B, 1, 1]. Value and chroma stay; a channel is a ramp of the hue."""
    red, green, blue = pixels.unbind(dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    per = (chroma + (chroma == 0)).reciprocal_()
    hue = torch.where(
        value == red,
        (green - blue).mul_(per),
        torch.where(value == green, (blue - red).mul_(per).add_(2), (red - green).mul_(per).add_(4)),
    ).add_(sixths)
    hue.sub_((hue / 6).floor_().mul_(6))
    red.copy_(hue).sub_(3).abs_().neg_().add_(2)
    green.copy_(hue).sub_(2).abs_().sub_(1)
    blue.copy_(hue).sub_(4).abs_().sub_(1)
    torch.addcmul(value[:, None], pixels.clamp_(0, 1), chroma[:, None], value=-1, out=pixels)
