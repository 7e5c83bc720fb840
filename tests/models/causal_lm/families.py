"""Tiny models of transformers' families of causal language models, and folders of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trunkline.models.causal_lm.config import CausalLMModel, Pretrain

SIZES: dict[str, Any] = dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "embedding_size"), 32)
SIZES |= dict.fromkeys(("attention_hidden_size", "word_embed_proj_dim"), 32)
SIZES |= dict.fromkeys(
    (
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
        "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads",
        "attention_heads", "num_experts_per_tok", "mamba_expand", "attn_layer_period", "expert_layer_period",
    ),
    2,
)  # fmt: skip
SIZES |= dict.fromkeys(
    ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "d_inner", "d_ff", "dff"), 48
)
SIZES |= dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64)
SIZES |= dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_intermediate_size"), 16)
SIZES |= dict.fromkeys(("q_lora_rank", "kv_lora_rank", "shared_expert_intermediate_size", "mamba_d_head"), 16)
SIZES |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "mamba_n_heads", "conv_kernel"), 4)
SIZES |= dict.fromkeys(("state_size", "time_step_rank", "mamba_d_state", "mamba_d_conv"), 4)
SIZES |= dict.fromkeys(("num_key_value_heads", "n_group", "topk_group", "first_k_dense_replace"), 1)
SIZES |= {"attn_layer_offset": 1, "expert_layer_offset": 1, "sliding_window": 64, "rotary_dim": 8, "vocab_size": 97}
SIZES |= {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "is_decoder": True}

EXTRA: dict[str, dict[str, Any]] = {
    "codegen": {"n_embd": 64, "n_head": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "diffllama": {"num_key_value_heads": 2},
    "deepseek_v2": {"num_key_value_heads": 2},
    "deepseek_v3": {"num_key_value_heads": 2},
    "minicpm3": {"num_key_value_heads": 2},
    "dots1": {"n_shared_experts": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1},
}


def tiny_config(family: str, **keys: Any) -> Any:
    """transformers' configuration of `family`, its model_type, with every size that it has made small."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind: Any = CONFIG_MAPPING[family]
    known = {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}
    small = {name: value for name, value in SIZES.items() if name in known and name not in kind.attribute_map}
    return kind(**(small | EXTRA.get(family, {}) | keys))


def saved(config: Any, folder: Path, **keys: Any) -> CausalLMModel:
    """A model of this configuration with random weights, saved to a folder as its makers would."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return CausalLMModel(objective=Pretrain(type="pretrain"), path=str(folder), **keys)
