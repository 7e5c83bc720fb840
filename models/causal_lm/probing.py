"""What a model of any family does with its attention, its head and packed rows, found out by trying a dozen tokens.

Families differ in ways that their configurations do not tell: some do more after their head than others, some do not
hand what they are given down to their attention, and a recurrent state passes from one document of a row to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.packed_attention import packing_tables
from kernels.transformers_attention import NAME as TRUNKLINE

if TYPE_CHECKING:
    from models.causal_lm.network import CausalLM

_LENGTHS = (5, 7)  # of two documents
_LOUDER = 16.0  # times the logits, or an untrained model would whisper; a power of two is taken back exactly
_RTOL, _ATOL = 1e-4, 1e-2  # far above fp32's rounding, far below what a leak or a missing layer does

Way = Callable[["CausalLM"], Tensor]
"""A way to the losses of both documents' tokens, [10] fp32."""


@torch.no_grad()
def settle(network: CausalLM, may_switch: bool) -> None:
    """Set `fused` and `packs` of a network. Where `may_switch`, let torch attend if flash_attention is not the same.

    Right is what each document's tokens lose alone, by the model's own logits, under torch's attention.
    """
    was_training, head = network.training, network.lm.get_output_embeddings().weight
    network.eval()
    head.mul_(_LOUDER)
    if may_switch and network.attention == TRUNKLINE:
        torchs = _let_torch_attend(network)
        right = _by_logits(network)
        packs = _gives(right, _packed, network)
        network.lm.set_attn_implementation(TRUNKLINE)
        if not _gives(right, _by_logits, network) or (packs and not _gives(right, _packed, network)):
            network.lm.set_attn_implementation(torchs)
    else:
        right = _by_logits(network)
    network.fused = network.fused and _gives(right, _by_head, network)
    network.packs = _gives(right, _packed, network)
    head.mul_(1 / _LOUDER)
    network.train(was_training)


def _let_torch_attend(network: CausalLM) -> str:
    try:
        network.lm.set_attn_implementation("sdpa")
    except ValueError:  # not every family has it
        network.lm.set_attn_implementation("eager")
    return network.attention


def _gives(right: Tensor, way: Way, network: CausalLM) -> bool:
    try:
        losses = way(network)
    except Exception:  # models of other people's raise what they like
        return False
    return torch.allclose(losses, right, rtol=_RTOL, atol=_ATOL)


def _documents(network: CausalLM) -> list[Tensor]:
    """Two documents, [1, n] int64 each."""
    vocab_size = network.lm.config.get_text_config().vocab_size
    ids = (torch.arange(sum(_LENGTHS), device=network.lm.device) * 7 + 3) % vocab_size
    return list(ids[None].split(_LENGTHS, dim=1))


def _by_logits(network: CausalLM) -> Tensor:
    logits = [(network.lm(input_ids=ids, use_cache=False).logits, ids) for ids in _documents(network)]
    return torch.cat([F.cross_entropy(z[0, :-1].float(), ids[0, 1:], reduction="none") for z, ids in logits])


def _by_head(network: CausalLM) -> Tensor:
    documents = [(ids, _next(ids)) for ids in _documents(network)]
    return torch.cat([network(ids, targets, reduction="none")[0, :-1] for ids, targets in documents])


def _packed(network: CausalLM) -> Tensor:
    documents = _documents(network)
    ids, targets = torch.cat(documents, dim=1), torch.cat([_next(ids) for ids in documents], dim=1)
    document = torch.arange(len(_LENGTHS)).repeat_interleave(torch.tensor(_LENGTHS))[None]
    positions = torch.cat([torch.arange(length) for length in _LENGTHS])[None]
    tables = {name: table.to(ids.device) for name, table in packing_tables(document).items()}
    losses = network(ids, targets, positions.to(ids.device), document.to(ids.device), tables, reduction="none")
    return losses[targets >= 0]


def _next(ids: Tensor) -> Tensor:
    return F.pad(ids[:, 1:], (0, 1), value=-100)
