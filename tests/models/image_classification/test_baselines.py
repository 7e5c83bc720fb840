from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from trunkline.engine.errors import ConfigError
from trunkline.models.image_classification import baselines as module
from trunkline.models.image_classification.baselines import baselines

HAS_SKLEARN = importlib.util.find_spec("sklearn") is not None


class _Images:
    """Images of one gray value, dark ones of class 0 and bright ones of class 1."""

    def __init__(self, count: int, seed: int, edge: int = 4) -> None:
        self.labels = np.arange(count) % 2
        self._values = self.labels * 200 + np.random.default_rng(seed).integers(0, 40, count)
        self._edge = edge

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"image": np.full((self._edge, self._edge, 3), self._values[index], np.uint8)}

    def name(self, index: int) -> str:
        return str(index)


@pytest.mark.skipif(not HAS_SKLEARN, reason="scikit-learn is not installed")
def test_classes_that_brightness_tells_apart_are_told_apart() -> None:
    test = _Images(30, 1)
    test.labels = np.where(np.arange(30) < 3, 1 - test.labels, test.labels)  # three are labelled wrongly
    assert set(baselines(_Images(60, 0), test).values()) == {0.9}


@pytest.mark.skipif(HAS_SKLEARN, reason="scikit-learn is installed")
def test_without_scikit_learn_it_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"pip install -c constraints\.txt scikit-learn"):
        baselines(_Images(6, 0), _Images(6, 1))


def test_images_that_these_classifiers_are_not_for_give_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert baselines(_Images(6, 0), _Images(6, 1, edge=5)) == {}
    monkeypatch.setattr(module, "MOST_VALUES", 100)
    assert baselines(_Images(6, 0), _Images(6, 1)) == {}
