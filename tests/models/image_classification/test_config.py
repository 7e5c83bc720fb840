"""The sections: what cannot be is said with the key and the remedy."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from trunkline.models.image_classification.config import ImageData


@pytest.mark.parametrize(
    ("augmentation", "said"),
    [
        ({"crop": {"scale": (0.5, 0.2)}}, "'scale' is from 0.5 to 0.2"),
        ({"crop": {"scale": (0, 1)}}, "'scale' is from 0 to 1: give a number above 0"),
        ({"crop": {"ratio": (0, 2)}}, "'ratio' is from 0 to 2"),
        ({"crop": {"scale": (0.5, 1.2)}}, "less than or equal to 1"),
        ({"hue": 0.6}, "less than or equal to 0.5"),
        ({"mixup": -0.1}, "greater than or equal to 0"),
    ],
)
def test_augmentation_that_cannot_be_is_refused(augmentation: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        ImageData(path="images", augmentation=augmentation)
