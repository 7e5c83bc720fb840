"""The network of a run, new or from a Hugging Face folder, kept causal.

make_network(model, hf_config)   new weights, or those of `model.path`
hf_config_of(model, ...)         the configuration that transformers builds the network from
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline.engine.checkpoint.digests import check_digests
from trunkline.engine.errors import CheckpointError, ConfigError
from trunkline.models.causal_lm.config import CausalLMModel, LlamaShape
from trunkline.models.causal_lm.network import CausalLM
from trunkline.models.causal_lm.probing import NotCausalError, settle
from trunkline.models.causal_lm.transformers_attention import NAME as TRUNKLINE
from trunkline.models.causal_lm.transformers_attention import register_with_transformers
from trunkline.models.text.file_format import FileFormat, shell_of
from trunkline.models.text.folder import brief, read_config, reading
from trunkline.models.text.lm import check_size, load_lm

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


AUTO_CLASS = "AutoModelForCausalLM"
"""transformers' class that opens such a model."""


def llama_config(shape: LlamaShape, max_length: int) -> PreTrainedConfig:
    """A Llama of this shape: pre-norm, RMSNorm 1e-6, RoPE 10000, grouped queries, SwiGLU, tied embedding."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=max_length,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )


def hf_config_of(model: CausalLMModel, max_length: int) -> PreTrainedConfig:
    """The configuration of the model's folder, or of a new Llama. Raises CheckpointError or ConfigError."""
    if model.path is None:
        return llama_config(model.shape, max_length)
    folder = Path(model.path)
    check_digests(folder)
    config = read_config(folder)
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < max_length:
        raise ConfigError(
            f"data.max_length is {max_length}, but the model of {folder} knows {longest} positions: set it to "
            f"{longest} or less, --set data.max_length={longest}"
        )
    return config


def make_network(model: CausalLMModel, hf_config: PreTrainedConfig) -> CausalLM:
    """The network, in fp32: initialised from torch's global generator, or with the weights of `model.path`.

    Raises CheckpointError if the folder's weights do not fit, and ConfigError if no attention makes the model causal.
    """
    register_with_transformers()
    folder = None if model.path is None else Path(model.path)
    with nullcontext() if folder is None else reading(folder):
        if folder is not None:
            check_size(folder, hf_config)
            FileFormat(shell_of(hf_config, AUTO_CLASS), folder)  # names files that are damaged and shapes that differ
        attentions, lacking = attentions_of(model, hf_config), ""
        wanted = attentions[0]
        for place, attention in enumerate([*attentions, "eager"]):
            try:
                lm = load_lm(AUTO_CLASS, hf_config, folder, attention)
            except (ValueError, KeyError) as error:  # some families lack one, or have a table of their own
                if place == len(attentions):
                    raise
                lacking = lacking or brief(error)
            else:
                attentions = attentions[place:]
                break
    name, where = type(lm).__name__, f" of {model.path}" if model.path else ""
    network = CausalLM(lm)
    try:
        if not attentions:
            raise NotCausalError(f"{model.attention}: {lacking}")
        if lm.device.type != "meta":  # else there are no values to look at
            network.attention_note = settle(network, attentions)
        if lacking:
            network.attention_note = f"{wanted} is not used: {lacking}"
    except NotCausalError as error:
        others = "" if model.attention == "auto" else '; set model.attention to "auto"'
        raise ConfigError(f"{name}{where} cannot be trained to predict the next token: {error}{others}") from error
    except Exception as error:  # a model of other people's raises what it likes
        raise CheckpointError(f"{name}{where} cannot be run: {brief(error)}") from error
    return network


_NOT_OURS = ("sliding_window", "attn_logit_softcapping", "attention_dropout", "attn_pdrop", "alibi", "layer_types")
"""Configuration keys that, where they are set, ask for an attention that flash_attention is not."""


def attentions_of(model: CausalLMModel, hf_config: PreTrainedConfig) -> list[str]:
    """The attentions of transformers that may be used, the best first."""
    if model.attention != "auto":
        return [model.attention]
    text: Any = hf_config.get_text_config()
    asked = [name for name in _NOT_OURS if getattr(text, name, None)]
    if asked == ["layer_types"] and set(text.layer_types) == {"full_attention"}:
        asked = []
    if "attn_logit_softcapping" in asked:  # which torch's attention leaves out
        return ["eager"]
    return ["sdpa", "eager"] if asked or not 16 <= head_dim_of(text) <= 256 else [TRUNKLINE, "sdpa", "eager"]


def head_dim_of(config: Any) -> int:
    """Channels of an attention head; 0 where a model has no such thing."""
    heads = getattr(config, "num_attention_heads", None)
    return getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
