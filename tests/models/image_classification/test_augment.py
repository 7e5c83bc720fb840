"""Augmentation: against Pillow, scipy and colorsys, and the same pixels in any batch."""

from __future__ import annotations

import colorsys
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from trunkline.engine.data.randomness import mix
from trunkline.models.image_classification.augment import (
    augmented,
    central_part,
    jittered,
    prepared,
    random_part,
    sampled,
    turned,
)
from trunkline.models.image_classification.config import Augmentation, Crop, ImageData
from trunkline.models.image_classification.data import collate

S = 24
NOTHING = Augmentation(flip=0, rotate=0, brightness=0, contrast=0, saturation=0, hue=0)
EVERYTHING = Augmentation(rotate=20, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2, crop=Crop())


def image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth picture with a sharp rectangle in it."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    pixels = np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    pixels[height // 4 : height // 2, width // 3 : width // 2] = rng.integers(0, 256, 3)
    return pixels


def batch_of(images: list[np.ndarray], first: int = 0) -> dict[str, torch.Tensor]:
    batch = collate([{"image": each, "label": 0, "index": index} for index, each in enumerate(images)])
    return batch | {"draw": torch.tensor([mix(1, first + place) for place in range(len(images))])}


def data(augmentation: Augmentation = NOTHING, img_size: int = S) -> ImageData:
    return ImageData(path="nowhere", img_size=img_size, augmentation=augmentation)


def test_an_image_of_the_right_size_is_normalised_and_nothing_else() -> None:
    images = [image(S, S, seed) for seed in range(3)]
    mean, std = (np.array(each, np.float32) for each in (data().mean, data().std))
    want = torch.from_numpy((np.stack(images).astype(np.float32) / 255 - mean) / std).permute(0, 3, 1, 2)
    batch = batch_of(images)
    torch.testing.assert_close(prepared(batch, data()), want, rtol=0, atol=1e-6)
    assert torch.equal(augmented(batch, data()), prepared(batch, data())), "nothing is drawn"


@pytest.mark.parametrize("size", [(30, 50), (50, 30), (24, 37), (17, 64)])
def test_what_is_not_square_is_cut_to_the_central_square(size: tuple[int, int]) -> None:
    pixels = image(*size)
    short = min(size)
    top, left = (size[0] - short) / 2, (size[1] - short) / 2
    rows = (np.arange(S) + 0.5) * short / S - 0.5
    grid = np.meshgrid(rows + top, rows + left, indexing="ij")
    want = np.stack([ndimage.map_coordinates(pixels[..., c] / 255, grid, order=1, mode="nearest") for c in range(3)])
    batch = batch_of([pixels])
    upright = torch.eye(2)[None]
    found = sampled(batch, S, central_part(batch["size"]), upright)[0]
    np.testing.assert_allclose(found, want, atol=2e-3)  # places are multiples of 1 / 4,096 of a pixel


def test_flips_are_those_of_numpy_in_every_bit_and_half_of_the_images_are_flipped() -> None:
    images = [image(S, S, seed) for seed in range(4)] * 50
    batch = batch_of(images)
    plain = prepared(batch, data())
    found = augmented(batch, data(NOTHING.model_copy(update={"flip": 0.5})))
    is_flipped = torch.tensor([torch.equal(a, b.flip(2)) for a, b in zip(found, plain, strict=True)])
    is_same = torch.tensor([torch.equal(a, b) for a, b in zip(found, plain, strict=True)])
    assert (is_flipped ^ is_same).all()
    assert 75 < is_flipped.sum() < 125


def test_rotation_turns_as_pillow_does_and_leaves_black_corners() -> None:
    pixels = image(64, 64)
    batch = batch_of([pixels] * 6)
    options = NOTHING.model_copy(update={"rotate": 40.0})
    turns = turned(batch["draw"], options)
    found = sampled(batch, 64, central_part(batch["size"]), turns)
    angles = torch.atan2(turns[:, 1, 0], turns[:, 0, 0]).rad2deg()
    assert angles.abs().max() <= 40
    assert angles.min() < 0 < angles.max()
    for place, angle in enumerate(angles.tolist()):
        want = np.asarray(Image.fromarray(pixels).rotate(angle, Image.Resampling.BILINEAR)).astype(np.float32)
        difference = np.abs(found[place].permute(1, 2, 0).numpy() * 255 - want)
        assert np.median(difference) < 1, "Pillow rounds to whole grey levels"
        assert (difference > 2).mean() < 0.02, "but for the edge, where Pillow takes half pixels for outside"
        assert found[place, :, 0, 0].max() == 0
        assert want[0, 0].max() == 0


def test_all_geometry_is_one_affine_map() -> None:
    images = [image(40, 61, seed) for seed in range(5)]
    batch = batch_of(images)
    part = random_part(batch["draw"], batch["size"], Crop(scale=(0.3, 0.8)))
    turns = turned(batch["draw"], Augmentation(rotate=25))
    found = sampled(batch, S, part, turns)
    for place, pixels in enumerate(images):
        scale = part.size[place].double().numpy() / S
        linear = scale[:, None] * turns[place].double().numpy()  # x, y
        offset = part.centre[place].double().numpy() - 0.5 + linear @ np.full(2, 0.5 - S / 2)
        matrix, start = linear[::-1, ::-1], offset[::-1]  # row, column
        want = [
            ndimage.affine_transform(pixels[..., c] / 255, matrix, start, (S, S), order=1, mode="grid-constant")
            for c in range(3)
        ]
        inside = ndimage.affine_transform(np.ones((40, 61)), matrix, start, (S, S), order=1, mode="grid-constant") == 1
        difference = np.abs(found[place].numpy() - np.stack(want))[:, inside]
        assert difference.max() < 2e-3


def test_parts_are_torchvision_s() -> None:
    """Share of the area and ratio are drawn as there; of a narrow image the largest central part is taken."""
    batch = torch.tensor([mix(2, place) for place in range(20_000)])
    size = torch.tensor([[200, 300]]).expand(len(batch), 2)
    part = random_part(batch, size, Crop())
    low, high = part.centre - part.size / 2, part.centre + part.size / 2
    assert low.min() >= 0
    assert (high <= torch.tensor([300.0, 200.0])).all()
    assert (part.size == part.size.round()).all()
    rng = np.random.default_rng(0)
    want = np.array([torchvision_s_part(rng, 200, 300, Crop()) for _ in range(20_000)])
    found = torch.cat([part.size, low], dim=1).numpy()
    for k in range(4):
        grid = np.quantile(want[:, k], [0.05, 0.25, 0.5, 0.75, 0.95])
        shares = (found[:, k, None] <= grid).mean(axis=0) - (want[:, k, None] <= grid).mean(axis=0)
        assert np.abs(shares).max() < 0.02
    narrow = random_part(batch[:50], torch.tensor([[10, 400]]).expand(50, 2), Crop(scale=(1.0, 1.0)))
    assert (narrow.size == torch.tensor([13.0, 10.0])).all(), "round(10 x 4 / 3)"
    assert (narrow.centre == torch.tensor([194 + 6.5, 5.0])).all(), "round((400 - 13) / 2) is 194"


def torchvision_s_part(rng: np.random.Generator, height: int, width: int, crop: Crop) -> tuple[int, int, int, int]:
    """Width, height, left and top, as torchvision.transforms.RandomResizedCrop.get_params is written."""
    for _ in range(10):
        area = height * width * rng.uniform(*crop.scale)
        ratio = math.exp(rng.uniform(math.log(crop.ratio[0]), math.log(crop.ratio[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return w, h, int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
    w = min(width, round(height * crop.ratio[1]))
    h = min(height, round(width / crop.ratio[0]))
    return w, h, (width - w) // 2, (height - h) // 2


def test_colours_change_as_torchvision_defines_it() -> None:
    """Against a loop over pixels with colorsys, with the factors read from what each step alone does."""
    pixels = torch.from_numpy(image(8, 8, 3)).permute(2, 0, 1).float()[None].expand(6, -1, -1, -1) / 255
    draw = torch.tensor([mix(3, place) for place in range(6)])
    options = Augmentation(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2)
    found = jittered(pixels.clone(), draw, options)
    grey = torch.full((6, 3, 1, 1), 0.5)
    brightness = jittered(grey.clone(), draw, NOTHING.model_copy(update={"brightness": 0.4}))[:, 0, 0, 0] / 0.5
    two = torch.tensor([0.4, 0.6]).expand(6, 3, 1, 2).clone()
    contrast = jittered(two, draw, NOTHING.model_copy(update={"contrast": 0.4}))[:, 0, 0].diff(dim=1)[:, 0] / 0.2
    coloured = torch.tensor([0.6, 0.4, 0.4]).view(1, 3, 1, 1).repeat(6, 1, 1, 1)
    saturated = jittered(coloured.clone(), draw, NOTHING.model_copy(update={"saturation": 0.4}))
    saturation = (saturated[:, 0] - saturated[:, 1]).flatten() / 0.2
    turned_red = jittered(coloured.clone(), draw, NOTHING.model_copy(update={"hue": 0.2}))[:, :, 0, 0]
    hue = torch.tensor([colorsys.rgb_to_hsv(*each)[0] for each in turned_red.tolist()])
    hue = torch.where(hue > 0.5, hue - 1, hue)
    for factors in (brightness, contrast, saturation):
        assert 0.6 <= factors.min() < 1 < factors.max() <= 1.4
    assert -0.2 <= hue.min() < 0 < hue.max() <= 0.2
    for place in range(6):
        want = pixels[place].permute(1, 2, 0).double().numpy()
        luma = np.array([0.2989, 0.587, 0.114])
        want = np.clip(want * float(brightness[place]), 0, 1)
        mean = (want @ luma).mean()
        want = np.clip(mean + float(contrast[place]) * (want - mean), 0, 1)
        own = (want @ luma)[..., None]
        want = np.clip(own + float(saturation[place]) * (want - own), 0, 1)
        for row in want.reshape(-1, 3):
            h, s, v = colorsys.rgb_to_hsv(*row)
            row[:] = colorsys.hsv_to_rgb((h + float(hue[place])) % 1, s, v)
        np.testing.assert_allclose(found[place].permute(1, 2, 0).numpy(), want, atol=2e-5)


def test_the_same_pixels_in_any_batch_and_beside_images_of_any_size() -> None:
    """However samples are split into micro-batches and ranks, and however far a batch is padded."""
    images = [image(20 + 7 * seed % 31, 28 + 11 * seed % 40, seed) for seed in range(7)]
    whole = augmented(batch_of(images), data(EVERYTHING))
    for split in ((1,) * 7, (3, 4), (2, 2, 2, 1)):
        ends = np.cumsum([0, *split])
        parts = [augmented(batch_of(images[a:b], int(a)), data(EVERYTHING)) for a, b in pairwise(ends)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)
        geometric = EVERYTHING.model_copy(update={"contrast": 0.0})
        parts = [augmented(batch_of(images[a:b], int(a)), data(geometric)) for a, b in pairwise(ends)]
        assert torch.equal(torch.cat(parts), augmented(batch_of(images), data(geometric)))


def test_large_images_are_made_few_at_a_time_and_are_the_same() -> None:
    images, large = [image(30, 40, seed) for seed in range(3)], data(EVERYTHING, img_size=512)
    whole = augmented(batch_of(images), large)
    alone = [augmented(batch_of([each], place), large) for place, each in enumerate(images)]
    torch.testing.assert_close(whole, torch.cat(alone), rtol=0, atol=1e-6)


def test_nothing_outside_an_image_is_seen() -> None:
    """White images in a padded batch stay white, but for black corners where they are turned."""
    white = [np.full(size, 255, np.uint8) for size in ((20, 30, 3), (64, 21, 3), (30, 90, 3))]
    batch = batch_of(white)
    batch["image"][0, 20:], batch["image"][0, :, 30:] = 77, 77
    found = sampled(batch, S, random_part(batch["draw"], batch["size"], Crop()), torch.eye(2).expand(3, 2, 2))
    assert (found == 1).all()
    turns = turned(batch["draw"], Augmentation(rotate=45))
    found = sampled(batch, S, central_part(batch["size"]), turns)
    assert ((found == 1) | (found == 0)).all()
    assert (found == 0).any()


def test_a_draw_changes_with_its_key() -> None:
    pixels = image(S, S)
    found = augmented(batch_of([pixels] * 5), data(Augmentation()))
    assert all(not torch.equal(found[0], each) for each in found[1:])
