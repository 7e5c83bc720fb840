"""CausalLM: a Hugging Face causal language model whose head and loss are one, so that logits are never held whole.

    make_network(model, hf_config)   new weights, or those of `model.path`
    hf_config_of(model, ...)         the configuration that transformers builds the network from

The network is transformers' own, parameter for parameter; what changes is its last linear layer, which is a LinearLoss,
and its attention, which is trunkline.kernels.attention.flash where that can do what the model asks for.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trunkline.engine.checkpoint.digests import check_digests
from trunkline.engine.errors import CheckpointError, ConfigError
from trunkline.kernels.linear_cross_entropy import linear_cross_entropy
from trunkline.models.causal_lm.config import CausalLMModel, LlamaShape
from trunkline.models.causal_lm.data import IGNORE
from trunkline.models.causal_lm.file_format import FileFormat, misfit, shell_of
from trunkline.models.causal_lm.folder import brief, read_config, reading, tensor_shapes
from trunkline.models.causal_lm.probing import NotCausalError, settle
from trunkline.models.causal_lm.transformers_attention import NAME as TRUNKLINE
from trunkline.models.causal_lm.transformers_attention import register_with_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROWS_AT_ONCE = 1024
"""Logits that are turned into fp32 at a time where a model makes them itself."""


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
            f"{longest} or less"
        )
    return config


def make_network(model: CausalLMModel, hf_config: PreTrainedConfig) -> CausalLM:
    """The network, in fp32: initialised from torch's global generator, or with the weights of `model.path`.

    Raises CheckpointError if the folder's weights do not fit, and ConfigError if no attention makes the model causal.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # every rank would draw one, in the middle of what the run says
    register_with_transformers()
    loader: Any = AutoModelForCausalLM
    folder = None if model.path is None else Path(model.path)

    def build(attention: str) -> Any:
        if folder is None:
            return loader.from_config(hf_config, attn_implementation=attention, dtype=torch.float32)
        lm, found = loader.from_pretrained(
            folder, config=hf_config, attn_implementation=attention, dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True, local_files_only=True, trust_remote_code=False, weights_only=True,
        )  # fmt: skip
        _check_fit(folder, found)
        return lm

    with nullcontext() if folder is None else reading(folder):
        if folder is not None:
            _check_size(folder, hf_config)
            FileFormat(shell_of(hf_config), folder)  # names files that are damaged and shapes that differ
        attentions, lacking = attentions_of(model, hf_config), ""
        wanted = attentions[0]
        for place, attention in enumerate([*attentions, "eager"]):
            try:
                lm = build(attention)
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


def _check_fit(folder: Path, found: dict[str, Any]) -> None:
    """Raises CheckpointError that lists the tensors of which transformers did not find what the network needs."""
    wrong = sorted(found["missing_keys"]) + [
        f"{name} is {list(theirs)}, not {list(ours)}" for name, theirs, ours in sorted(found["mismatched_keys"])
    ]
    if wrong:
        raise misfit(folder, wrong)


def _check_size(folder: Path, hf_config: PreTrainedConfig) -> None:
    """Raises CheckpointError for more layers than tensors, which would take a while to be built."""
    layers, tensors = getattr(hf_config.get_text_config(), "num_hidden_layers", 0), len(tensor_shapes(folder))
    if isinstance(layers, int) and layers > tensors:
        raise misfit(folder, [f"num_hidden_layers is {layers}, and there are {tensors} tensors"])


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


class LinearLoss(nn.Linear):
    """A language model's head: logits of `hidden`, or with `targets` their cross-entropy, without holding logits.

    It is a module, not a function of its weight, so that whatever shards the weight finds it used in a forward.
    """

    def forward(self, hidden: Tensor, targets: Tensor | None = None, reduction: str = "sum") -> Tensor:
        """Logits [..., vocab]; or with targets [B, L] the loss: a scalar ("sum") or [B, L] ("none"), fp32."""
        if targets is None:
            return super().forward(hidden)
        loss = linear_cross_entropy(
            hidden.flatten(0, 1), self.weight, targets.flatten(), bias=self.bias, ignore_index=IGNORE,
            reduction=reduction,
        )  # fmt: skip
        return loss if reduction == "sum" else loss.view_as(targets)


class CausalLM(nn.Module):
    """Negative log-likelihoods of tokens under `lm`, a transformers causal language model.

    fused: the loss is taken in the head; else from the logits that the model makes.
    attention_note: why another attention is used than the best that the configuration allows.
    packs: documents packed into a row leave one another alone.
    """

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm
        self._no_split_modules = sorted(lm._no_split_modules or ())
        self.packs = True
        self.attention_note: str | None = None
        head = lm.get_output_embeddings()
        self.fused = type(head) is nn.Linear
        if self.fused:
            head.__class__ = LinearLoss  # the same parameters under the same names, tied or not

    @property
    def attention(self) -> str:
        """The attention that transformers uses."""
        return self.lm.config._attn_implementation

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor,
        position_ids: Tensor | None = None,
        document: Tensor | None = None,
        packing: dict[str, Tensor] | None = None,
        reduction: str = "sum",
    ) -> Tensor:
        """-log p(targets) under the model, summed (a scalar) or for each position ([B, L], reduction "none"), fp32.

        Args:
            input_ids: [B, L] int64, padded on the right.
            targets: [B, L] int64, the token that each position is to predict; IGNORE where it is to predict none.
            position_ids, document: [B, L] int64, of packed rows: the place in its document, and the document's number.
            packing: of packed rows: the tables of trunkline.kernels.attention.packed.
        """
        # padding stands on the right, so causal attention needs no mask to leave it out
        inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
        if document is not None:
            inputs["position_ids"] = position_ids
        if self.attention == TRUNKLINE:  # which does not read the mask, but says so to transformers by having one
            inputs |= {"packing": packing or {}, "attention_mask": torch.ones_like(input_ids)}
        elif document is not None:
            sees = _same_document(document)
            inputs["attention_mask"] = _additive(sees, self.lm.dtype) if self.attention == "eager" else sees
        if self.fused:
            hidden = self.lm.base_model(**inputs).last_hidden_state
            return self.lm.get_output_embeddings()(hidden, targets, reduction)
        return _cross_entropy(self.lm(**inputs).logits, targets, reduction)


def _same_document(document: Tensor) -> Tensor:
    """bool [B, 1, L, L]: whether key j is in query i's document and not after it. Every query sees itself."""
    L = document.shape[1]
    causal = torch.ones(L, L, dtype=torch.bool, device=document.device).tril()
    return (causal & (document[:, :, None] == document[:, None, :]))[:, None]


def _additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where a key is seen, the lowest number where it is not."""
    return torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)


def _cross_entropy(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """The cross-entropy of logits that a model made itself, in fp32 a part at a time."""

    def part(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), targets, ignore_index=IGNORE, reduction="none")

    rows, wanted = logits.flatten(0, 1), targets.flatten()
    parts = [
        checkpoint(part, rows[at : at + ROWS_AT_ONCE], wanted[at : at + ROWS_AT_ONCE], use_reentrant=False)
        for at in range(0, len(rows), ROWS_AT_ONCE)
    ]
    loss = torch.cat(parts)
    return loss.sum() if reduction == "sum" else loss.view_as(targets)
