"""A trained encoder-decoder from a run's folder: network and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trunkline.engine.checkpoint.trained import trained_sections
from trunkline.models.seq2seq.build import head_of, hf_config_of, make_network
from trunkline.models.seq2seq.config import Seq2SeqData, Seq2SeqModel
from trunkline.models.text.folder import read_generation, token_ids
from trunkline.models.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Trained:
    """folder: where the weights lie; lm: transformers' model; data, model: what it was trained on and for.

    stops: the tokens that end a text: the tokenizer's EOS, and those of generation_config.json
    """

    folder: Path
    lm: Any
    tokenizer: Any
    data: Seq2SeqData
    model: Seq2SeqModel
    stops: list[int]


def load_sections(run: Path) -> tuple[Path, Seq2SeqData, Seq2SeqModel]:
    """The folder with a run's weights, and what they were trained on and for. Raises CheckpointError, ConfigError."""
    return trained_sections(run, "seq2seq", Seq2SeqData, Seq2SeqModel)


def at(folder: Path, model: Seq2SeqModel) -> Seq2SeqModel:
    """The same objective and ways, with the weights of `folder`."""
    return Seq2SeqModel(
        objective=model.objective, attention=model.attention, generation=model.generation, path=str(folder)
    )


def load_trained(run: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Trained:
    """The model of a run, in eval mode on `device`. Raises CheckpointError or ConfigError."""
    folder, data, model = load_sections(run)
    here = at(folder, model)
    lm = make_network(here, hf_config_of(here), head_of(here)).lm
    tokenizer = load_tokenizer(folder)
    stops = stop_ids(tokenizer.eos_token_id, read_generation(folder))
    return Trained(folder, lm.to(dtype).to(device).eval(), tokenizer, data, model, stops)


def stop_ids(eos: int, generation: dict[str, Any]) -> list[int]:
    """The tokens that end a text: EOS, and what a generation_config.json names."""
    return sorted({eos, *token_ids(generation.get("eos_token_id"), "eos_token_id")})
