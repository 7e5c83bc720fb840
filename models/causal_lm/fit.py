"""Whether a prepared data set fits the model that learns from it: the vocabulary, the window, the tokens' meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from trunkline.engine.errors import ConfigError
from trunkline.models.causal_lm.config import CausalLMData, CausalLMModel
from trunkline.models.causal_lm.store import Store
from trunkline.models.causal_lm.tokenizer import holds_tokenizer, open_tokenizer


def check_fit(
    store: Store, tokenizer: PreTrainedTokenizerFast, data: CausalLMData, model: CausalLMModel, hf_config: Any
) -> None:
    """Raises ConfigError that says which of data and model to change, and to what."""
    text = hf_config.get_text_config()
    if store.vocab_size > text.vocab_size:
        where = f"the model of {model.path}" if model.path else "the model's shape"
        raise ConfigError(
            f"data.store: {data.store}: its tokenizer has {store.vocab_size} tokens, but {where} has "
            f"{text.vocab_size}: prepare the data with the model's own tokenizer (--tokenizer), or choose a larger "
            "vocabulary"
        )
    window = getattr(text, "sliding_window", None)
    if data.packing and window is not None and window < data.max_length:
        raise ConfigError(
            f"data.packing: the attention of {model.path} slides a window of {window} tokens, which packed "
            f"rows of data.max_length = {data.max_length} tokens would not: set packing to false, or "
            f"max_length to {window} or less"
        )
    if model.path is not None and holds_tokenizer(Path(model.path)):
        _check_meaning(tokenizer, data, Path(model.path))


def _check_meaning(tokenizer: PreTrainedTokenizerFast, data: CausalLMData, folder: Path) -> None:
    """An id must mean what it means to the model that training starts from; new tokens may be added."""
    known = {number: token for token, number in open_tokenizer(folder).get_vocab().items()}
    for token, number in tokenizer.get_vocab().items():
        if known.get(number, token) != token:
            raise ConfigError(
                f"data.store: {data.store}: its token {number} is {token!r}, but {known[number]!r} to the "
                f"model of {folder}: prepare the data with --tokenizer {folder}"
            )
