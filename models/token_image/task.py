"""TokenImageTask: the clean image of a text from a noisy one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trunkline.engine.data.lazy import opened_late
from trunkline.engine.errors import ConfigError
from trunkline.engine.machine.files import copy_tree
from trunkline.engine.task import Batch, Sums, Task
from trunkline.engine.whole_state import WholeState
from trunkline.kernels.masked_mse import masked_mse
from trunkline.models.text.tokenizer import load_tokenizer, vocabulary_digest, vocabulary_size
from trunkline.models.token_image import checkpoint_pth, validation
from trunkline.models.token_image.config import TokenImageData, TokenImageModel
from trunkline.models.token_image.data import Sample, Texts, collate
from trunkline.models.token_image.denoiser import Denoiser
from trunkline.models.token_image.encodings import Encoding
from trunkline.models.token_image.flops import training_flops
from trunkline.models.token_image.information import Curve, curve_of
from trunkline.models.token_image.network import CONDITION_GRID
from trunkline.models.token_image.noise import alpha_of, drawn_coins, drawn_times, noised
from trunkline.models.token_image.prepared import check_prepared
from trunkline.models.token_image.store import KIND_KEY, Store
from trunkline.models.token_image.validation import Noisy

LEAST_NOISE = 0.05
"""The velocity's error is weighted as if there were at least so much noise. JiT's own choice."""


class TokenImageTask(Task):
    """The workload over a prepared data set. Raises DataError or ConfigError if data and model do not fit."""

    unit = "pixels"

    def __init__(self, data: TokenImageData, model: TokenImageModel) -> None:
        self.data, self.model = data, model
        rows, columns = model.shape.patch
        if data.img_size % rows or data.img_size % columns:
            raise ConfigError(
                f"data.img_size {data.img_size} is no multiple of model.patch {[rows, columns]}: change either"
            )
        self.store = Store.open(data.store)
        check_prepared(self.store, data)
        if self.store.kind == "dialogues" and not model.condition:
            raise ConfigError(
                f"model.condition: false, but data.store {data.store} holds dialogues, whose prompt is a condition: "
                "set it to true, or prepare the data with --kind texts"
            )
        grid = data.img_size // rows, data.img_size // columns
        if self.store.kind == "dialogues" and max(grid) > CONDITION_GRID:
            raise ConfigError(
                f"model.patch: {[rows, columns]} cuts img_size {data.img_size} into {grid[0]} x {grid[1]} patches, and "
                f"a condition has {CONDITION_GRID} x {CONDITION_GRID} at most: use larger patches"
            )
        self.tokenizer = self.store.tokenizer()
        for split in ("train", "val"):  # what is wrong with either should be named now
            self.dataset(split)

    @cached_property
    def encoding(self) -> Encoding:
        """Of the data's tokens."""
        return Encoding(self.data.encoding, self.store.vocab_size)

    def build_model(self) -> Denoiser:
        """A new network for images of the data's size and encoding."""
        return Denoiser(self.model, self.data.img_size, self.encoding, self.frequencies, self.curve)

    def dataset(self, split: str) -> Texts:
        """The texts of "train", "val" or "test"."""
        return Texts(self.store, split, self.data, self.eos)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """See trunkline.models.token_image.data."""
        return collate(samples, self.data.img_size**2)

    def weight(self, batch: Batch) -> Tensor:
        """The number of pixels that hold a token."""
        return batch["length"].where(batch["valid"], 0).sum()

    def loss(self, model: nn.Module, batch: Batch) -> Sums:
        """At a drawn time, summed over the pixels that hold a token: the squared error over channels, or -log p."""
        return {"loss": self._error(self._noisy(model, batch), batch)}

    def _noisy(self, model: nn.Module, batch: Batch) -> Noisy:
        clean, held = self.images(batch)
        t = drawn_times(batch["draw"], self.model.noise)
        # by the curve that the network knows, which is of the data that its training began with
        alpha = model.alpha(t) if self.curve else self.alpha(t)  # type: ignore[operator]
        x = noised(clean, alpha, batch["draw"])
        given = x, t, held, *self.condition(batch)
        output = model(*given, previous=self._estimate(model, given, batch["draw"]))
        return Noisy(clean, x, t, alpha, held & batch["valid"][:, None, None], output)

    def _estimate(self, model: nn.Module, given: Sequence[Tensor], draw: Tensor) -> Tensor | None:
        """What half of the samples see with self-conditioning; black for the rest.

        It is made for all of them, so that each rank calls the network as often.
        """
        if not self.model.self_conditioning:
            return None
        with torch.no_grad():
            estimate: Tensor = model.clean(model(*given))  # type: ignore[operator]
        return estimate * drawn_coins(draw)[:, None, None, None]

    def _error(self, seen: Noisy, batch: Batch) -> Tensor:
        if self.model.loss == "cross_entropy":
            tokens = batch["tokens"].view(seen.counted.shape).masked_fill(~seen.counted, -100)
            return F.cross_entropy(seen.output.float().flatten(0, 2), tokens.flatten(), reduction="sum")
        weights = seen.counted[..., None]
        if self.model.loss == "v":
            weights = weights * (1 - seen.alpha).clamp(min=LEAST_NOISE).pow(-2)[:, None, None, None]
        return masked_mse(seen.output, seen.clean, weights)[0]

    def evaluate(self, model: nn.Module, batch: Batch) -> Sums:
        """The sums of `loss`, and what trunkline.models.token_image.validation tells of the same forward."""
        seen = self._noisy(model, batch)
        bound = model.known() if self.curve else None  # type: ignore[operator]
        further = validation.sums(seen, batch["tokens"], self.encoding, self.gives_logits, bound)
        return {"loss": self._error(seen, batch), "weight": self.weight(batch)} | further

    def summarize(self, sums: Sums) -> dict[str, float]:
        """loss, token_accuracy; with the noise "information" also bits_per_token."""
        return {"loss": float(sums["loss"] / sums["weight"])} | validation.metrics(sums)

    def show(self, sums: Sums, folder: Path) -> None:
        """accuracy.png: of tokens, by time."""
        validation.plot(sums, folder / "accuracy.png")

    @property
    def gives_logits(self) -> bool:
        """Whether the network gives logits of tokens, or else the clean image."""
        return self.model.loss == "cross_entropy"

    def alpha(self, t: Tensor) -> Tensor:
        """fp32, the share of the image at times t."""
        return alpha_of(t, self.model.noise, self.curve and self.curve.to(t.device))

    @cached_property
    def frequencies(self) -> Tensor:
        """fp32 [V], of the training texts' tokens and EOS; what is never there counts as if it were once."""
        texts = self.store.column("train", "text")
        counts = texts.counts(self.store.vocab_size) + 1
        counts[self.eos] += len(texts)
        return torch.from_numpy(counts / counts.sum()).float()

    @cached_property
    def curve(self) -> Curve | None:
        """What noise leaves of tokens by their frequencies, with the schedule "information"."""
        if self.model.noise != "information":
            return None
        return curve_of(self.encoding, self.frequencies)

    def images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The clean images, fp32 [B, S, S, C], black at padding; and which pixels hold a token, bool [B, S, S]."""
        return self._images(batch["tokens"], batch["length"])

    def condition(self, batch: Batch) -> tuple[Tensor, Tensor] | tuple[()]:
        """The condition's image and its pixels with tokens, as `images` gives them; nothing where there is none."""
        return self._images(batch["condition"], batch["condition_length"]) if "condition" in batch else ()

    def _images(self, tokens: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        size = self.data.img_size
        held = torch.arange(size**2, device=tokens.device) < length[:, None]
        pixels = self.encoding.encode(tokens) * held[..., None]
        return pixels.unflatten(1, (size, size)), held.view(-1, size, size)

    def direction(self, metric: str) -> Literal["min", "max"] | None:
        """Whether it is better high or low."""
        return {"token_accuracy": "max", "bits_per_token": "min"}.get(metric)  # type: ignore[return-value]

    def flops_per_sample(self) -> float:
        """Products of matrices of an image, forward and backward."""
        conditioned = self.store.kind == "dialogues"
        return training_flops(self.model, self.data.img_size, self.encoding, conditioned=conditioned)

    def fingerprint(self) -> str:
        """Names the data set's content, and how images are made of it."""
        size, most, stride = self.data.img_size, self.data.capacity, self.data.stride
        cut = f"{most} tokens" if stride is None else f"{most} tokens every {stride}"
        return f"{self.store.fingerprint} as {size} x {size} of {cut} in {self.data.encoding}"

    def meaning(self) -> dict[str, Any]:
        """Which token is which."""
        return {"vocabulary": vocabulary_digest(self.tokenizer)}

    def notes(self) -> list[str]:
        """What of the data was cut."""
        return [f"{split}: {note}" for split in ("train", "val") for note in self.dataset(split).notes]

    def read_state(self, path: Path, steps_per_epoch: int) -> WholeState:
        """A checkpoint_epoch_N.pth or best_model.pth of plain torch."""
        return checkpoint_pth.read(path, self.build_model(), steps_per_epoch)

    def save_assets(self, folder: Path) -> dict[str, Any]:
        """The tokenizer, and in config.json the kind of the data."""
        copy_tree(self.store.root / "tokenizer", folder / "tokenizer")
        return {KIND_KEY: self.store.kind}

    @cached_property
    def eos(self) -> int:
        eos: int = self.tokenizer.eos_token_id
        return eos


class _WithoutData(TokenImageTask):
    """The task without its data, which are read only where something is asked that needs them.

    All tokens are equally frequent.
    """

    def __init__(self, data: TokenImageData, model: TokenImageModel) -> None:
        self.data, self.model = data, model
        self.store = opened_late(lambda: Store.open(data.store))
        self.tokenizer = opened_late(lambda: self.store.tokenizer())

    @cached_property
    def encoding(self) -> Encoding:
        """Of the tokens of data.tokenizer; without it of any, where none of the network depends on their number."""
        if self.data.tokenizer is not None:
            return Encoding(self.data.encoding, vocabulary_size(load_tokenizer(Path(self.data.tokenizer))))
        is_free = self.data.encoding == "rgb" and self.model.prior == "none" and not self.gives_logits
        return Encoding("rgb", 2) if is_free else super().encoding

    @cached_property
    def frequencies(self) -> Tensor:
        """fp32 [V]."""
        return torch.full((self.encoding.vocab_size,), 1 / self.encoding.vocab_size)

    def largest_sample(self) -> Sample:
        """All places of an image."""
        return Sample(np.zeros(self.data.capacity, np.int64))


make_task, weights_task = TokenImageTask, _WithoutData
