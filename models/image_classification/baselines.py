"""What simple classifiers reach on the same images: scikit-learn's, as they are by default, on pixels from 0 to 1.

baselines(train, test)   {"5 nearest neighbours": accuracy on test, ...}
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trunkline.engine.errors import ConfigError

if TYPE_CHECKING:
    from trunkline.models.image_classification.data import Images

MOST_VALUES = 1 << 26
"""Of all images together: beyond, these classifiers take longer than a network."""


def baselines(train: Images, test: Images) -> dict[str, float]:
    """The share of `test` that each classifies right, fitted on `train`. {} if images differ in size or are too many.

    Takes seconds for 5,000 images of 28 x 28 pixels. Raises ConfigError if scikit-learn is not installed.
    """
    if (len(train) + len(test)) * train[0]["image"].size > MOST_VALUES:
        return {}
    known, unknown = _pixels(train), _pixels(test)
    if known is None or unknown is None or known.shape[1:] != unknown.shape[1:]:
        return {}
    if (known == known[..., :1]).all() and (unknown == unknown[..., :1]).all():  # gray: one channel says it all
        known, unknown = known[..., 0], unknown[..., 0]
    fitted, judged = (each.reshape(len(each), -1).astype(np.float32) / 255 for each in (known, unknown))
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.neighbors import KNeighborsClassifier
        from sklearn.svm import SVC
    except ImportError as error:
        raise ConfigError(
            "scikit-learn is not installed, whose classifiers are compared with: "
            "pip install -c constraints.txt scikit-learn"
        ) from error
    classifiers = {
        "5 nearest neighbours": KNeighborsClassifier(),
        "logistic regression": LogisticRegression(max_iter=1000),
        "support vectors, RBF kernel": SVC(),
    }
    return {
        name: float(np.mean(classifier.fit(fitted, train.labels).predict(judged) == test.labels))
        for name, classifier in classifiers.items()
    }


def _pixels(images: Images) -> NDArray[np.uint8] | None:
    """uint8 [N, H, W, 3]; None if they differ in size."""
    pixels = [images[index]["image"] for index in range(len(images))]
    return np.stack(pixels) if len({each.shape for each in pixels}) == 1 else None
