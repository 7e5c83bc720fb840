"""register_with_transformers: flash_attention as an attention of Hugging Face's models.

    register_with_transformers()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="trunkline")

Causal and bidirectional attention, grouped key heads, padding, and decoding one token at a time with a cache that
grows. What it cannot do raises ValueError: dropout, sliding windows, biases, sinks and soft caps of scores, attention
weights as a result, several tokens after a cache, caches of a fixed size.

Rows into which several documents are packed take the tables of kernels/attention/packed.py, which models hand down to
their attention with every other keyword that they do not know:

    model(input_ids, position_ids=position_ids, attention_mask=document >= 0, packing=packing_tables(document))

position_ids [B, L] start from 0 in each document. attention_mask, bool [B, L], is not read. It is given because without
one transformers takes such position_ids apart itself, with a wait for the GPU, and asks for a mask of L x L, which
raises ValueError here. `use_cache=False` keeps keys that nobody will ask for from being held.

Rows of one document each, from position 0 on and with padding behind it, need no mask: causal attention sees no padding
from a real token. attention_mask=None saves the work of masking; or, where the model is traced (torch.compile, fake
tensors) and transformers cannot look at the positions, a mask and packing={}, which says that there are no others.
https://huggingface.co/docs/transformers/attention_interface
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trunkline.kernels.attention.flash import flash_attention
from trunkline.kernels.attention.packed import packed_attention

NAME = "trunkline"
_UNSUPPORTED = (
    "sliding_window",
    "softcap",
    "s_aux",
    "position_bias",
    "head_mask",
    "cu_seq_lens_q",
    "output_attentions",
)


def register_with_transformers() -> None:
    """Make attn_implementation="trunkline" known to the transformers library."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, padding_mask)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    packing: dict[str, Tensor] | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """([B, N, Hq, D], None) from query [B, Hq, N, D], key and value [B, Hkv, M, D] and `padding_mask`'s mask [B, M].

    With `packing`, the tables of packing_tables, tokens see those before them in their own document, whatever the mask;
    without a table in it, every row is a document.
    Raises ValueError for what flash_attention cannot do.
    """
    for name in _UNSUPPORTED:
        if arguments.get(name) is not None and arguments[name] is not False:
            raise ValueError(f"the attention {NAME!r} has no {name}; got {arguments[name]!r}")
    if dropout > 0:
        raise ValueError(f"the attention {NAME!r} has no dropout; set attention_dropout to 0, it is {dropout}")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention_mask must be [batch, keys]; got shape {list(attention_mask.shape)}")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    num_queries, num_keys = query.shape[1], key.shape[1]
    if causal and num_queries not in (1, num_keys):
        raise ValueError(
            f"the attention {NAME!r} takes 1 query or as many as keys; got {num_queries} for {num_keys} keys"
        )
    if packing is not None:
        if not causal or num_queries != num_keys:
            raise ValueError(
                f"the attention {NAME!r} packs documents for causal attention without a cache; got "
                f"is_causal={causal}, {num_queries} queries and {num_keys} keys"
            )
        if packing:
            return packed_attention(query, key, value, packing, softmax_scale=scaling), None
        attention_mask = None
    out = flash_attention(
        query,
        key,
        value,
        causal_block=1 if causal and num_queries > 1 else None,
        key_mask=None if attention_mask is None else attention_mask.bool(),
        softmax_scale=scaling,
    )
    return out, None


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Tensor | None:
    """The tokenizer's mask, bool [B, kv_length], for attention_forward.

    Raises ValueError if the model asks for any other pattern than causal or bidirectional.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask_function not in (None, causal_mask_function, bidirectional_mask_function):
        raise ValueError(
            f"the attention {NAME!r} is causal or bidirectional, with padding; this model asks for another mask, "
            f"{getattr(mask_function, '__qualname__', mask_function)}; for documents packed into rows, give "
            "attention_mask and packing, of trunkline.kernels.attention.packed"
        )
    causal = mask_function is not bidirectional_mask_function
    if causal and (isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length):
        raise ValueError(f"the attention {NAME!r} needs a cache that grows with the sequence, not one of a fixed size")
    return None if attention_mask is None else attention_mask[:, -kv_length:]
