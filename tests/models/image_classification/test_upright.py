from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.models.image_classification.image_tree import pixels_of
from trunkline.models.image_classification.augment import augmented, random_part
from trunkline.models.image_classification.config import Augmentation, Crop, ImageData
from trunkline.models.image_classification.data import collate
from trunkline.models.image_classification.upright import upright


def _resized(pixels: np.ndarray, box: tuple[int, int, int, int], edge: int) -> torch.Tensor:
    part = Image.fromarray(pixels).crop(box).resize((edge, edge), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(part)).permute(2, 0, 1)


def _furthest(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).abs().max())


@pytest.mark.parametrize("box", [(0, 0, 60, 40), (7, 3, 19, 30), (2, 1, 55, 40), (5, 5, 6, 6)])
def test_a_part_is_what_pillow_makes_of_it(box: tuple[int, int, int, int]) -> None:
    images = np.stack([pixels_of("a", 40, 60), pixels_of("b", 40, 60)])
    corner, size = torch.tensor([box[:2]] * 2), torch.tensor([[box[2] - box[0], box[3] - box[1]]] * 2)
    found = upright(torch.from_numpy(images), corner, size, torch.tensor([False, True]), 16)
    assert _furthest(found[0], _resized(images[0], box, 16)) <= 1
    assert _furthest(found[1], _resized(images[1], box, 16).flip(2)) <= 1


def test_without_rotation_training_sees_pillows_crops_of_images_of_any_size() -> None:
    plain = Augmentation(flip=0, rotate=0, brightness=0, contrast=0, saturation=0, hue=0, crop=Crop())
    data = ImageData(path=".", img_size=16, augmentation=plain, mean=(0, 0, 0), std=(1, 1, 1))
    images = [pixels_of("a", 32, 50), pixels_of("b", 47, 32), pixels_of("c", 9, 9)]
    batch = collate([{"image": image, "label": 0, "index": place} for place, image in enumerate(images)])
    batch["draw"] = torch.tensor([11, 12, 13])
    part = random_part(batch["draw"], batch["size"], Crop())
    corner = (part.centre - part.size / 2).int()
    for found, image, (left, upper), (width, height) in zip(
        augmented(batch, data), images, corner.tolist(), part.size.int().tolist(), strict=True
    ):
        expected = _resized(image, (left, upper, left + width, upper + height), 16)
        assert _furthest(found * 255, expected) < 1.001
