"""What lies beside a language model's weights, for whatever reads them next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline.engine.errors import ConfigError
from trunkline.engine.machine.files import copy_tree, write_json
from trunkline.models.text.tokenizer_files import keep_tokens, tokenizer_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def write_assets(
    folder: Path, tokenizer: PreTrainedTokenizerFast, store: Path, config: dict[str, Any], generation: dict[str, Any]
) -> dict[str, Any]:
    """The tokenizer of a store, generation_config.json and config.json, which is returned as it is written.

    Raises ConfigError if transformers would not tokenize there as the store was tokenized.
    """
    copy_tree(store / "tokenizer", folder, left_out=("config.json",))  # of the tokenizer's folder; the model's follows
    write_json(folder / "generation_config.json", generation)
    if "tokenizer_class" not in tokenizer_settings(folder):
        config["tokenizer_class"] = type(tokenizer).__name__  # else the model's type would decide
    config.pop("_name_or_path", None)
    config = json.loads(json.dumps(config, default=str))
    write_json(folder / "config.json", config)  # by which transformers chooses the tokenizer's class
    if not keep_tokens(tokenizer, folder):
        raise ConfigError(
            f"data.store: {store}: its tokenizer gives other tokens in transformers beside a model of type "
            f"{config['model_type']!r}: prepare the data with the model's own tokenizer (--tokenizer)"
        )
    return config
