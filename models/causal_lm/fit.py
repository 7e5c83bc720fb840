"""Whether a prepared data set fits the model that learns from it: the vocabulary, the window, the tokens' meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from trunkline.engine.errors import ConfigError
from trunkline.models.causal_lm.config import CausalLMData, CausalLMModel
from trunkline.models.causal_lm.store import Store
from trunkline.models.text.tokenizer import check_ids


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
    if model.path is not None:
        check_ids(tokenizer, Path(model.path), data.store)
