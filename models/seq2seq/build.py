"""The network of a run, new or from a Hugging Face folder.

    hf_config_of(model)                      the configuration that transformers builds the network from
    head_of(model)                           whether its head is the shared embedding
    make_network(model, hf_config, head)     new weights, or those of `model.path`
    load_weights(network, path, head)        those of `model.weights`

transformers 5 ties every T5. A head stays apart only where a folder holds one of other values; by its configuration's
tie_word_embeddings transformers decides whether hidden states are scaled.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from trunkline.engine.checkpoint.digests import check_digests
from trunkline.engine.checkpoint.foreign import load_foreign
from trunkline.engine.errors import CheckpointError, ConfigError
from trunkline.models.seq2seq.config import Seq2SeqModel, T5Shape
from trunkline.models.seq2seq.network import Seq2Seq, scales_hidden
from trunkline.models.text.file_format import FileFormat, shell_of
from trunkline.models.text.folder import read_config, read_tensors, reading, tensor_shapes
from trunkline.models.text.lm import check_size, load_lm

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

AUTO_CLASS = "AutoModelForSeq2SeqLM"
"""transformers' class that opens such a model."""

FAMILIES = ("t5", "mt5")
"""model_type of the folders that are read: T5 1.0 and 1.1, Flan, byT5; and mT5."""

HEAD = "lm_head.weight"
_SHARED = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

Head = Literal["tied", "own", "untied"]
"""The shared embedding; the folder's own; or one that begins as the shared embedding and is trained apart."""


def t5_config(shape: T5Shape, dropout: float) -> PreTrainedConfig:
    """A T5 of this shape."""
    from transformers import T5Config

    make: Any = T5Config
    config: PreTrainedConfig = make(
        **shape._asdict(), dropout_rate=dropout, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        architectures=["T5ForConditionalGeneration"], dtype="float32",
    )  # fmt: skip
    return config


def hf_config_of(model: Seq2SeqModel) -> PreTrainedConfig:
    """The configuration of the model's folder, or of a new T5. Raises CheckpointError or ConfigError."""
    if model.path is None:
        return _checked(t5_config(model.shape, 0.1 if model.dropout is None else model.dropout), "model")
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
    return _checked(config, f"model.path: {folder / 'config.json'}")


def _checked(config: Any, where: str) -> Any:
    """Raises ConfigError where T5's relative positions fail.

    The encoder divides distances by a quarter of the buckets, the decoder by half. Both divide by the logarithm of the
    largest distance over that. So a distance would be divided by zero, or the logarithm be that of 1.
    """
    buckets = config.relative_attention_num_buckets
    if buckets < 4:
        raise ConfigError(f"{where}: relative_attention_num_buckets {buckets}: use 4 or more, which T5's formula needs")
    most, own = config.relative_attention_max_distance, buckets // 2
    if most <= own:
        raise ConfigError(
            f"{where}: relative_attention_max_distance {most}: {own} distances have a bucket each "
            f"(relative_attention_num_buckets {buckets}), and those above share the "
            f"others: use {own + 1} or more"
        )
    return config


def head_of(model: Seq2SeqModel) -> Head:
    """Which head the model has. Raises CheckpointError, and ConfigError where it can not be tied."""
    own = model.path is not None and _has_own_head(Path(model.path))
    if own and model.tie_word_embeddings:
        raise ConfigError(
            f"model.tie_word_embeddings: the model of {model.path} has a head of its own ({HEAD} is not "
            f"{_SHARED[0]}): remove the key, or set it to false"
        )
    return "own" if own else "untied" if model.tie_word_embeddings is False else "tied"


def make_network(model: Seq2SeqModel, hf_config: PreTrainedConfig, head: Head) -> Seq2Seq:
    """The network, in fp32: initialised from torch's global generator, or with the weights of `model.path`.

    Raises CheckpointError if the folder's weights do not fit.
    """
    attention = "sdpa" if model.attention == "trunkline" else model.attention
    folder = None if model.path is None else Path(model.path)
    hf_config = copy.deepcopy(hf_config)  # which untie changes
    with nullcontext() if folder is None else reading(folder):
        if folder is not None:
            check_size(folder, hf_config)
            FileFormat(shell(hf_config, head), folder)  # names files that are damaged and shapes that differ
        lm = load_lm(AUTO_CLASS, hf_config, folder, attention)
    if head == "untied":
        untie(lm)
    return Seq2Seq(lm, model.attention)


def shell(hf_config: PreTrainedConfig, head: Head) -> Any:
    """transformers' model without values."""
    found = shell_of(copy.deepcopy(hf_config), AUTO_CLASS)
    if head != "tied":
        untie(found)
    return found


def untie(lm: Any) -> None:
    """Give the head a weight of its own, by which the logits are those of the tied one."""
    scale = lm.config.d_model**-0.5 if scales_hidden(lm.config) else 1.0
    lm.lm_head.weight = nn.Parameter(lm.shared.weight.detach() * scale)
    lm.config.scale_decoder_outputs = False
    lm.all_tied_weights_keys.pop(HEAD, None)  # transformers' list of what is tied


def load_weights(network: Seq2Seq, path: Path, head: Head) -> str:
    """Put a state dict into a new network. Returns a line for whoever starts the run. Raises CheckpointError.

    A head that is to be untied is made from the embedding there, unless the file has one that is not tied.
    """
    found: dict[str, Tensor] = {}
    ours = f"lm.{HEAD}"

    def noted(name: str, tensor: Tensor) -> Tensor:
        found[name] = tensor
        return tensor

    try:
        line = load_foreign(
            network, path, lambda name: f"lm.{name}", reshape=noted, fresh=[ours] if head == "untied" else []
        )
    except CheckpointError as error:
        twins = [found[name] for name in (ours, f"lm.{_SHARED[0]}") if name in found]
        own = head == "tied" and len(twins) == 2 and not torch.equal(*twins)
        remedy = "\n  Its head is not its embedding: set model.tie_word_embeddings to false" if own else ""
        raise CheckpointError(f"model.weights: {error}{remedy}") from error
    shared = network.lm.shared.weight
    if head == "untied" and (ours not in found or torch.equal(found[ours].to(shared.dtype), shared)):
        with torch.no_grad():
            network.lm.lm_head.weight.copy_(shared * network.lm.config.d_model**-0.5)
    return line


def _has_own_head(folder: Path) -> bool:
    """Whether transformers will keep the head of a folder apart, because its values are not the embedding's."""
    names = tensor_shapes(folder)
    embedding = next((name for name in _SHARED if name in names), None)
    if embedding is None or HEAD not in names:
        return False
    held = read_tensors(folder, [embedding, HEAD])
    return not torch.equal(held[embedding], held[HEAD])
