"""What a model does with attention, head and packed rows, found by trying.

Families differ in ways that their configurations do not tell. Some do not hand what they are given down to their
attention, or have one that is causal only by a mask which transformers leaves out for other attentions. Some do more
after their head than others, or add to the loss. A recurrent state passes from one document of a row to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trunkline.kernels.attention.packed import packing_tables
from trunkline.models.causal_lm.network import CausalLM
from trunkline.models.causal_lm.transformers_attention import NAME as TRUNKLINE

_SHORT, _LONG = 5, 7  # tokens of two documents; of the long ones the first _SHORT are those of the short one
_LOUDER = 16.0  # times the logits, or an untrained model would whisper; a power of two is taken back exactly
_RTOL, _ATOL = 1e-4, 1e-2  # far above fp32's rounding, far below what a leak or a missing layer does
_SAME_RTOL, _SAME_ATOL = 1e-5, 1e-5  # of the same computation with other tokens beside: experts group them anew


class NotCausalError(Exception):
    """No attention that may be used gives the model's own loss, each token from those before it alone."""


@torch.no_grad()
def settle(network: CausalLM, attentions: Sequence[str]) -> str | None:
    """Set the attention of a network, `fused` and `packs`. Returns why it is not the first of `attentions`, if so.

    Right is what each document's tokens lose alone, in eager mode, where transformers always makes the causal mask.
    The first of `attentions` that is right is taken, but one that packs documents comes before one that does not.
    Raises NotCausalError if none is right; and whatever the model raises in eager mode.
    """
    was_training, fused = network.training, network.fused
    network.eval()
    network.fused = False
    try:
        with _louder(network.lm.get_output_embeddings()):
            right = _right(network)
            faults: dict[str, str] = {}
            alone = None  # the first attention that is right, but for packed rows
            for name in attentions:
                if fault := _fault(network, name, right):
                    faults[name] = fault
                elif network.packs:
                    break
                else:
                    alone = alone or name
                    faults[name] = "it does not keep packed documents apart"
            else:
                if alone is None:
                    raise NotCausalError("; ".join(f"{name}: {fault}" for name, fault in faults.items()))
                faults.pop(alone)
                _attend(network, alone)
                network.packs = False
            network.fused = fused
            network.fused = fused and _fault_of_rows(network, right) is None
    finally:
        network.train(was_training)
    first = attentions[0]
    return f"{first} is not used: {faults[first]}" if first in faults and network.attention != first else None


@contextmanager
def _louder(head: Any) -> Iterator[None]:
    """The weights of the model's last layer, which may be those of its first, multiplied."""
    if head is None or getattr(head, "weight", None) is None:
        yield
        return
    head.weight.mul_(_LOUDER)
    try:
        yield
    finally:
        head.weight.mul_(1 / _LOUDER)


def _attend(network: CausalLM, name: str) -> None:
    """Let transformers attend by `name`, or at least make the masks for it. Raises ValueError where it cannot."""
    if name == TRUNKLINE and not network.lm._can_set_attn_implementation():
        raise ValueError("its attention does not use transformers' attention interface")
    network.lm.config._attn_implementation = network.lm.get_correct_attn_implementation(name)


def _fault(network: CausalLM, name: str, right: Tensor) -> str | None:
    """What is wrong with an attention; None, and `packs` set, if nothing is."""
    try:
        _attend(network, name)
        first, other = _alone(network, 0), _alone(network, 1)
        if not _same(first[:_SHORT], other[:_SHORT]):
            return "later tokens change the loss of earlier ones"
        if not _equal(torch.stack([first, other]), right):
            return "the loss is not that of eager mode"
        if fault := _fault_of_rows(network, right):
            return fault
    except Exception as error:  # models of other people's raise what they like
        return f"it fails ({_brief(error)})"
    network.packs = _packs(network, right)
    return None


def _fault_of_rows(network: CausalLM, right: Tensor) -> str | None:
    """The same of rows of different lengths, side by side."""
    try:
        losses = network(*_rows(network), reduction="none")
    except Exception as error:
        return f"it fails with several rows ({_brief(error)})"
    if not _equal(losses[:2], right) or not _equal(losses[2, :_SHORT], right[0, :_SHORT]):
        return "the loss of a row depends on the rows beside it or on its padding"
    return None if _same(losses[0, :_SHORT], losses[2, :_SHORT]) else "padding changes the loss of the tokens before it"


def _packs(network: CausalLM, right: Tensor) -> bool:
    """Whether documents of one row leave one another alone."""
    first, other = _documents(network)
    third = (other + 1) % _vocab_size(network)
    pairs = [(first[:_SHORT], first), (first[:_SHORT], other), (third[:_SHORT], first)]
    ids = torch.stack([torch.cat(pair) for pair in pairs])
    targets = torch.cat([_targets(first)[:_SHORT], _targets(first)]).expand(len(pairs), -1)
    lengths = torch.tensor([_SHORT, _LONG])
    document = torch.arange(2).repeat_interleave(lengths).expand(len(pairs), -1)
    positions = torch.cat([torch.arange(_SHORT), torch.arange(_LONG)]).expand(len(pairs), -1)
    tables = {name: table.to(ids.device) for name, table in packing_tables(document).items()}
    try:
        losses = network(ids, targets, positions.to(ids.device), document.to(ids.device), tables, reduction="none")
    except Exception:  # models of other people's raise what they like
        return False
    front, back = losses.split([_SHORT, _LONG], dim=1)
    return (
        _equal(front[:2], right[:1, :_SHORT].expand(2, -1)) and _equal(back[:2], right) and _equal(back[2], right[0])
        and _same(front[0], front[1]) and _same(back[0], back[2])
    )  # fmt: skip


def _right(network: CausalLM) -> Tensor:
    """The losses of both documents, each alone, in eager mode, [2, _LONG]. Raises NotCausalError."""
    _attend(network, "eager")
    losses = torch.stack([_alone(network, 0), _alone(network, 1)])
    if not _same(losses[0, :_SHORT], losses[1, :_SHORT]):
        raise NotCausalError("later tokens change the loss of earlier ones, in eager mode too")
    _check_own_loss(network, losses[0, :-1].mean())
    return losses


def _check_own_loss(network: CausalLM, mean: Tensor) -> None:
    """Raises NotCausalError if the model itself says that the first document's loss is something else."""
    ids = _documents(network)[:1]
    try:
        own = network.lm(input_ids=ids, labels=ids, use_cache=False).loss
    except TypeError:  # takes no labels
        return
    if own is None or _same(own, mean) or _same(own, network(ids, ids, reduction="none").mean()):  # does not shift
        return
    raise NotCausalError(f"its own loss is not the mean cross-entropy of the tokens alone ({own:.5g}, not {mean:.5g})")


def _alone(network: CausalLM, number: int) -> Tensor:
    """The losses of one document under the first one's targets, [_LONG]."""
    documents = _documents(network)
    return network(documents[number][None], _targets(documents[0])[None], reduction="none")[0]


def _rows(network: CausalLM) -> tuple[Tensor, Tensor]:
    """Both documents, and what they have in common with padding behind it, as a batch."""
    first, other = _documents(network)
    padded = torch.where(torch.arange(_LONG, device=first.device) < _SHORT, first, first[0])
    return torch.stack([first, other, padded]), _targets(first).expand(3, -1)


def _documents(network: CausalLM) -> Tensor:
    """Two documents, [2, _LONG] int64, that differ after the first _SHORT tokens."""
    vocab_size = _vocab_size(network)
    first = torch.arange(_LONG, device=network.lm.device) * 7 + 3
    return torch.stack([first, torch.where(first < first[_SHORT], first, first + 5)]) % vocab_size


def _vocab_size(network: CausalLM) -> int:
    return network.lm.config.get_text_config().vocab_size


def _targets(document: Tensor) -> Tensor:
    return F.pad(document[1:], (0, 1), value=-100)


def _equal(losses: Tensor, right: Tensor) -> bool:
    return torch.allclose(losses, right.to(losses), rtol=_RTOL, atol=_ATOL)


def _same(losses: Tensor, right: Tensor) -> bool:
    return torch.allclose(losses, right, rtol=_SAME_RTOL, atol=_SAME_ATOL)


def _brief(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
