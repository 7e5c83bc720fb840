"""Small folders of T5's family, as transformers and its users write them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from tests.models.seq2seq.toy_pairs import SHAPE

FAMILIES = ("t5", "t5-1.1", "t5-1.1-tied", "flan", "mt5", "byt5")
GENERATION = {"max_new_tokens": 17, "num_beams": 3, "no_repeat_ngram_size": 2}


def write_folder(folder: Path, family: str, tokenizer: Path | None = None) -> Path:
    """A model with random weights and generation settings of its own; with a tokenizer's files, if they are given."""
    from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

    torch.manual_seed(len(family))
    shape: dict[str, Any] = dict(SHAPE) | {"dropout_rate": 0.1, "decoder_start_token_id": 0}
    if family == "t5":
        shape["tie_word_embeddings"] = True
    else:
        shape |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    if family == "byt5":
        shape["num_decoder_layers"] = 1
    make, of = (MT5ForConditionalGeneration, MT5Config) if family == "mt5" else (T5ForConditionalGeneration, T5Config)
    lm: Any = make(of(**shape))  # type: ignore[arg-type]
    with torch.no_grad():
        lm.shared.weight.mul_(0.3)
        if family != "t5" and not family.endswith("tied"):  # released ones have a head of their own
            lm.lm_head.weight = torch.nn.Parameter(torch.randn_like(lm.lm_head.weight))
            lm.all_tied_weights_keys.pop("lm_head.weight")
    lm.generation_config.update(**GENERATION)
    lm.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("scale_decoder_outputs", None)  # as released: transformers of that time did not write it
    path.write_text(json.dumps(config | {"tie_word_embeddings": shape["tie_word_embeddings"]}))
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder
