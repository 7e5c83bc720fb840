"""TokenImageTask: the clean image of a text from a noisy one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from trunkline.engine.errors import ConfigError
from trunkline.engine.task import Batch, Sums, Task
from trunkline.kernels.masked_mse import masked_mse
from trunkline.models.token_image.config import TokenImageData, TokenImageModel
from trunkline.models.token_image.data import Texts, collate
from trunkline.models.token_image.encodings import Encoding
from trunkline.models.token_image.network import CONDITION_GRID, JiT
from trunkline.models.token_image.noise import alpha_of, drawn_times, noised
from trunkline.models.token_image.store import Store

LEAST_NOISE = 0.05
"""The velocity's error is weighted as if there were at least so much noise. JiT's own choice."""


def weights_task(data: TokenImageData, model: TokenImageModel) -> TokenImageTask:
    """The task for what it says of weights alone: it has no data."""
    task = object.__new__(TokenImageTask)
    task.data, task.model = data, model
    return task


class TokenImageTask(Task):
    """The workload over a prepared data set. Raises DataError or ConfigError if data and model do not fit."""

    unit = "pixels"

    def __init__(self, data: TokenImageData, model: TokenImageModel) -> None:
        self.data, self.model = data, model
        if data.img_size % model.shape.patch:
            raise ConfigError(
                f"data.img_size {data.img_size} is no multiple of model.patch {model.shape.patch}: change either"
            )
        self.store = Store.open(data.store)
        self.tokenizer = self.store.tokenizer()
        self.encoding = Encoding(data.encoding, self.store.vocab_size)
        for split in ("train", "val"):  # what is wrong with either should be named now
            self.dataset(split)

    def build_model(self) -> JiT:
        """A new network for images of the data's size and encoding."""
        return JiT(self.model.shape, self.data.img_size, self.encoding.channels)

    def dataset(self, split: str) -> Texts:
        """The texts of "train", "val" or "test"."""
        return Texts(self.store, split, self.data, self._eos)

    def collate(self, samples: Sequence[np.ndarray]) -> Batch:
        """See trunkline.models.token_image.data."""
        return collate(samples, self.data.img_size**2)

    def weight(self, batch: Batch) -> Tensor:
        """The number of pixels that hold a token."""
        return batch["length"].where(batch["valid"], 0).sum()

    def loss(self, model: nn.Module, batch: Batch) -> Sums:
        """Squared error at a drawn time, summed over channels and over the pixels that hold a token."""
        return {"loss": self._error(model, batch, drawn_times(batch["draw"]))}

    def images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The clean images, fp32 [B, S, S, C], black at padding; and which pixels hold a token, bool [B, S, S]."""
        size = self.data.img_size
        held = torch.arange(size**2, device=batch["tokens"].device) < batch["length"][:, None]
        pixels = self.encoding.encode(batch["tokens"]) * held[..., None]
        return pixels.unflatten(1, (size, size)), held.view(-1, size, size)

    def _error(self, model: nn.Module, batch: Batch, t: Tensor) -> Tensor:
        clean, held = self.images(batch)
        alpha = alpha_of(t, self.model.schedule)
        predicted = model(noised(clean, alpha, batch["draw"]), t, held)
        weights = (held & batch["valid"][:, None, None])[..., None]
        if self.model.loss == "v":
            weights = weights * (1 - alpha).clamp(min=LEAST_NOISE).pow(-2)[:, None, None, None]
        return masked_mse(predicted, clean, weights)[0]

    def direction(self, metric: str) -> Literal["min", "max"] | None:
        """Whether it is better high or low."""
        return None

    def flops_per_sample(self) -> float:
        """Matrix products and attention pairs of an image, forward and backward (3 x forward)."""
        patch, d, layers, _ = self.model.shape
        patches = (self.data.img_size // patch) ** 2
        tokens, values = CONDITION_GRID**2 + patches, patch**2 * self.encoding.channels
        block = 2 * tokens * 16 * d**2 + 4 * d**2 + 4 * d * tokens**2
        return 3.0 * (layers * block + 2 * 2 * patches * values * d)

    def fingerprint(self) -> str:
        """Names the data set's content, and how images are made of it."""
        return f"{self.store.fingerprint} as {self.data.img_size} x {self.data.img_size} of {self.data.encoding}"

    def notes(self) -> list[str]:
        """What of the data was cut."""
        return [f"{split}: {note}" for split in ("train", "val") for note in self.dataset(split).notes]

    def save_assets(self, folder: Path) -> dict[str, Any]:
        """The tokenizer."""
        shutil.copytree(self.store.root / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
        return {}

    @cached_property
    def _eos(self) -> int:
        eos: int = self.tokenizer.eos_token_id
        return eos


make_task = TokenImageTask
