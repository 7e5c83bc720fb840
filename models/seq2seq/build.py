"""The network of a run, new or from a Hugging Face folder.

make_network(model, hf_config)   new weights, or those of `model.path`
hf_config_of(model, store)       the configuration that transformers builds the network from
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trunkline.engine.checkpoint.digests import check_digests
from trunkline.engine.errors import CheckpointError, ConfigError
from trunkline.models.seq2seq.config import Seq2SeqModel, T5Shape
from trunkline.models.seq2seq.network import Seq2Seq
from trunkline.models.text.folder import read_config, reading

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

AUTO_CLASS = "AutoModelForSeq2SeqLM"
"""transformers' class that opens such a model."""

FAMILIES = ("t5", "mt5")
"""model_type of the folders that are read: T5 1.0 and 1.1, Flan, byT5; and mT5."""


def t5_config(shape: T5Shape, dropout: float, tied: bool) -> PreTrainedConfig:
    """A T5 of this shape. A head that is not tied reads hidden states that are not scaled, as T5 1.1's."""
    from transformers import T5Config

    make: Any = T5Config
    config: PreTrainedConfig = make(
        **shape._asdict(), dropout_rate=dropout, tie_word_embeddings=tied, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, architectures=["T5ForConditionalGeneration"], dtype="float32",
    )  # fmt: skip
    return config


def hf_config_of(model: Seq2SeqModel) -> PreTrainedConfig:
    """The configuration of the model's folder, or of a new T5. Raises CheckpointError or ConfigError."""
    if model.path is None:
        dropout = 0.1 if model.dropout is None else model.dropout
        return t5_config(model.shape, dropout, model.tie_word_embeddings is not False)
    folder = Path(model.path)
    check_digests(folder)
    config: Any = read_config(folder)
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"model.path: {folder}: a model of type {config.model_type!r}: give one of T5's family "
            f"({', '.join(FAMILIES)})"
        )
    if model.dropout is not None:
        config.dropout_rate = model.dropout
    return config


def make_network(model: Seq2SeqModel, hf_config: PreTrainedConfig) -> Seq2Seq:
    """The network, in fp32: initialised from torch's global generator, or with the weights of `model.path`.

    Raises CheckpointError if the folder's weights do not fit.
    """
    from transformers import AutoModelForSeq2SeqLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # every rank would draw one, in the middle of what the run says
    loader: Any = AutoModelForSeq2SeqLM
    attention = "sdpa" if model.attention == "trunkline" else model.attention
    folder = None if model.path is None else Path(model.path)
    with nullcontext() if folder is None else reading(folder):
        if folder is None:
            lm = loader.from_config(hf_config, attn_implementation=attention, dtype=torch.float32)
        else:
            lm, found = loader.from_pretrained(
                folder, config=hf_config, attn_implementation=attention, dtype=torch.float32, output_loading_info=True,
                ignore_mismatched_sizes=True, local_files_only=True, trust_remote_code=False, weights_only=True,
            )  # fmt: skip
            if missing := sorted(found["missing_keys"]) + sorted(found["mismatched_keys"]):
                raise CheckpointError(f"model.path: {folder}: lacks {missing[:3]}")
    return Seq2Seq(lm, model.attention)
