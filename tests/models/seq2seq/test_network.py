"""The network: documents apart, one loss for all attentions, a frozen encoder, 16 bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.seq2seq.test_build import model_of, network_of
from trunkline.models.seq2seq.network import Seq2Seq
from trunkline.models.text.linear_loss import IGNORE

NAMES = ("input_ids", "input_document", "decoder_input_ids", "target_document", "targets")


def batch(*rows: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Rows of pairs, each of the encoder's tokens and the decoder's, padded to 8 and 8."""
    columns: dict[str, list[list[int]]] = {name: [] for name in NAMES}
    for row in rows:
        values: dict[str, list[int]] = {name: [] for name in NAMES}
        for number, (source, target) in enumerate(row):
            values["input_ids"] += source
            values["input_document"] += [number] * len(source)
            values["decoder_input_ids"] += [0, *target[:-1]]
            values["target_document"] += [number] * len(target)
            values["targets"] += target
        for name, fill in zip(NAMES, (0, -1, 0, -1, IGNORE), strict=True):
            columns[name].append(values[name] + [fill] * (8 - len(values[name])))
    return {name: torch.tensor(rows) for name, rows in columns.items()}


ONE, TWO, THREE = ([5, 6, 1], [20, 21, 1]), ([7, 8, 9, 10, 1], [22, 1]), ([11, 1], [23, 24, 25, 26, 1])


def loss_and_gradients(network: Seq2Seq, given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    network.zero_grad()
    loss = network(**given)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["trunkline", "sdpa", "eager"])
def test_packed_pairs_have_the_loss_and_the_gradients_of_padded_ones(attention: str) -> None:
    network = network_of(model_of(attention=attention))
    padded, expected = loss_and_gradients(network, batch([ONE], [TWO], [THREE]))
    packed, found = loss_and_gradients(network, batch([ONE, TWO], [THREE]))
    torch.testing.assert_close(packed, padded, rtol=1e-6, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_all_attentions_have_one_loss_and_the_same_gradients() -> None:
    networks = [network_of(model_of(attention=name)) for name in ("trunkline", "sdpa", "eager")]
    given = batch([ONE, TWO], [THREE])
    (loss, expected), *others = (loss_and_gradients(network, given) for network in networks)
    for other, found in others:
        torch.testing.assert_close(other, loss, rtol=1e-6, atol=0)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_draws_the_same_dropout_twice() -> None:
    network = network_of(model_of(dropout=0.2)).train()
    given = batch([ONE, TWO], [THREE])
    torch.manual_seed(1)
    loss, expected = loss_and_gradients(network, given)
    network.lm.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(1)
    again, found = loss_and_gradients(network, given)
    assert torch.equal(loss, again)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_a_frozen_encoder_keeps_nothing_for_the_backward_pass_and_the_decoder_trains_as_before() -> None:
    whole = network_of(model_of())
    frozen = copy.deepcopy(whole)
    frozen.lm.encoder.requires_grad_(False)  # with it the shared embedding, which is the decoder's and the head's
    given = batch([ONE, TWO], [THREE])
    kept: dict[str, int] = {}
    found = {}
    for name, network in (("whole", whole), ("frozen", frozen)):

        def pack(tensor: Tensor, name: str = name) -> Tensor:
            kept[name] = kept.get(name, 0) + tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = network(**given)
        loss.backward()
        found[name] = {key: p.grad for key, p in network.named_parameters() if p.grad is not None}
    assert kept["frozen"] < 0.7 * kept["whole"]
    assert set(found["frozen"]) == {key for key in found["whole"] if key.startswith("lm.decoder.")}
    assert all(torch.equal(gradient, found["whole"][key]) for key, gradient in found["frozen"].items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_as_near_as_transformers_own_attention_is(dtype: torch.dtype) -> None:
    given = batch([ONE], [TWO], [THREE])
    exact = network_of(model_of())(**given)
    errors = [
        (network_of(model_of(attention=name)).to(dtype)(**given).float() - exact).abs().item()
        for name in ("trunkline", "eager")
    ]
    assert errors[0] <= 2 * errors[1] + 0.02 * exact.item()


def test_the_feed_forward_output_leaves_the_range_of_fp16_unharmed() -> None:
    network: Any = network_of(model_of()).half()
    wo = network.lm.decoder.block[0].layer[-1].DenseReluDense.wo
    with torch.no_grad():
        wo.weight.fill_(1000.0)
    out = wo(torch.full((1, 48), 100.0, dtype=torch.float16))
    assert out.dtype == torch.float32
    assert out.eq(48 * 1000.0 * 100.0).all()
