"""A trained denoiser from a run's folder: network and tokenizer, without the data that it was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trunkline.engine.checkpoint.trained import trained_sections
from trunkline.engine.checkpoint.weights import load_weights, read_config
from trunkline.models.text.tokenizer import load_tokenizer, vocabulary_size
from trunkline.models.token_image.config import TokenImageData, TokenImageModel
from trunkline.models.token_image.denoiser import Denoiser
from trunkline.models.token_image.encodings import Encoding
from trunkline.models.token_image.records import Kind
from trunkline.models.token_image.store import KIND_KEY


@dataclass(frozen=True)
class Trained:
    """folder: where the weights lie; data, model: what it was trained on and for.

    kind: of the data; None if the weights are of a version that did not say it
    """

    folder: Path
    network: Denoiser
    tokenizer: Any
    data: TokenImageData
    model: TokenImageModel
    device: torch.device
    kind: Kind | None = None

    @property
    def eos(self) -> int:
        """The token that ends a text."""
        found: int = self.tokenizer.eos_token_id
        return found

    def names(self) -> list[str]:
        """Each token as text; a square for the one that ends a text."""
        found: list[str] = self.tokenizer.batch_decode([[token] for token in range(self.network.encoding.vocab_size)])
        found[self.eos] = "□"
        return found


def load_trained(run: Path, device: torch.device) -> Trained:
    """The denoiser of a run, in eval mode on `device`. Raises CheckpointError or ConfigError."""
    folder, data, model = trained_sections(run, "token_image", TokenImageData, TokenImageModel)
    tokenizer = load_tokenizer(folder / "tokenizer")
    network = Denoiser(model, data.img_size, Encoding(data.encoding, vocabulary_size(tokenizer)))
    load_weights(network, folder)
    kind = read_config(folder / "config.json").get(KIND_KEY)
    return Trained(folder, network.to(device).eval(), tokenizer, data, model, device, kind)
