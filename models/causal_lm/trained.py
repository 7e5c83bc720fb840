"""A trained language model from a run's folder: network and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from trunkline.engine.checkpoint.trained import trained_sections
from trunkline.models.causal_lm.build import hf_config_of, make_network
from trunkline.models.causal_lm.config import CausalLMData, CausalLMModel
from trunkline.models.causal_lm.rendering import Renderer
from trunkline.models.causal_lm.tokenizer import stop_ids
from trunkline.models.text.folder import token_ids
from trunkline.models.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Trained:
    """folder: where the weights lie; lm: transformers' model; data, model: what it was trained on and for."""

    folder: Path
    lm: Any
    tokenizer: Any
    data: CausalLMData
    model: CausalLMModel

    @property
    def stops(self) -> list[int]:
        """The tokens that end a generated text: by the tokenizer, and by generation_config.json."""
        own = self.lm.generation_config.eos_token_id
        return sorted({*stop_ids(self.tokenizer), *token_ids(own, f"{self.folder}: eos_token_id")})

    @cached_property
    def renderer(self) -> Renderer:
        """What writes conversations as the model learned them."""
        return Renderer(self.tokenizer, f"the chat template of {self.folder}")


def load_sections(run: Path) -> tuple[Path, CausalLMData, CausalLMModel]:
    """The folder with a run's weights, and what they were trained on and for. Raises CheckpointError, ConfigError."""
    return trained_sections(run, "causal_lm", CausalLMData, CausalLMModel)


def at(folder: Path, model: CausalLMModel) -> CausalLMModel:
    """The same model section, with the weights of `folder`."""
    return CausalLMModel(objective=model.objective, attention=model.attention, path=str(folder))


def load_trained(run: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> Trained:
    """The model of a run, in eval mode on `device`. Raises CheckpointError or ConfigError.

    Of its generation_config.json only the tokens that end a text are kept: whoever generates says the rest.
    """
    from transformers import GenerationConfig

    folder, data, model = load_sections(run)
    here = at(folder, model)
    lm = make_network(here, hf_config_of(here, data.max_length)).lm
    lm.generation_config = GenerationConfig(eos_token_id=lm.generation_config.eos_token_id)
    for parameter in lm.parameters():  # not the buffers: rounded frequencies would put rotary positions elsewhere
        parameter.data = parameter.data.to(dtype)
    return Trained(folder, lm.to(device).eval(), load_tokenizer(folder), data, model)
