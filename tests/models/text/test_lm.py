"""transformers' networks as they are, but for their GELU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, MT5Config, PreTrainedConfig, T5Config
from transformers.activations import NewGELUActivation

from trunkline.models.text.lm import load_lm

SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
GATED = SHAPE | {"feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}
IDS = torch.tensor([[3, 5, 7, 1]])


@pytest.mark.parametrize(
    ("auto_class", "config", "blocks"),
    [
        ("AutoModelForSeq2SeqLM", T5Config(**GATED), 4),
        ("AutoModelForSeq2SeqLM", MT5Config(**GATED), 4),
        ("AutoModelForSeq2SeqLM", T5Config(**SHAPE, feed_forward_proj="relu"), 0),
        ("AutoModelForCausalLM", GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2), 2),
    ],
)
def test_the_gelu_is_torchs_with_the_same_results_and_keeps_less(
    auto_class: str, config: PreTrainedConfig, blocks: int
) -> None:
    ours = load_lm(auto_class, config, None, "eager").double().eval()
    theirs = copy.deepcopy(ours)
    for module in list(theirs.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GELU):
                setattr(module, name, NewGELUActivation())
    assert sum(isinstance(module, nn.GELU) for module in ours.modules()) == blocks
    assert not any(isinstance(module, NewGELUActivation) for module in ours.modules())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    (loss, slopes, kept), (expected, expected_slopes, more) = (_measured(lm) for lm in (ours, theirs))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(slopes, expected_slopes, rtol=1e-9, atol=1e-15)
    assert kept < more if blocks else kept == more


def _measured(lm: Any) -> tuple[Tensor, list[Tensor], int]:
    """The loss, its gradients, and how many numbers are kept for them."""
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        loss = lm(input_ids=IDS, labels=IDS).loss
    return loss.detach(), list(torch.autograd.grad(loss, list(lm.parameters()))), sum(kept)
