"""Causality of any family, on the way that training takes, against transformers' own logits in eager mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.models.causal_lm.families import saved, tiny_config
from trunkline.engine.errors import ConfigError
from trunkline.kernels.attention.packed import packing_tables
from trunkline.models.causal_lm.build import hf_config_of, make_network
from trunkline.models.causal_lm.network import CausalLM

L = 23  # tokens of a row, none of what the start-up looks at


def made(family: str, folder: Path, attention: str = "auto", **keys: Any) -> CausalLM:
    model = saved(tiny_config(family, **keys), folder, attention=attention)
    network = make_network(model, hf_config_of(model, 32)).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # untrained, a model's layers hardly show in its loss
            parameter.mul_(3)
    return network


def in_eager_mode(folder: Path, network: CausalLM, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The losses by transformers alone, row by row, in a model of its own."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    lm.load_state_dict(network.lm.state_dict())
    logits = torch.cat([lm(input_ids=row[None], use_cache=False).logits for row in ids])
    return F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")


def check(network: CausalLM, folder: Path) -> None:
    """Later tokens and padding change no loss, alone and beside other rows, and the losses are transformers'."""
    generator = torch.Generator().manual_seed(1)
    ids, other = torch.randint(4, 97, (2, 3, L), generator=generator)
    targets = torch.randint(4, 97, (3, L), generator=generator)
    with torch.no_grad():
        whole = network(ids, targets, reduction="none")
        expected = in_eager_mode(folder, network, ids, targets)
        torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-3)
        for seen in (1, 11, L - 1):
            changed = torch.cat([ids[:, :seen], other[:, seen:]], dim=1)
            for row in (slice(0, 1), slice(0, 3)):
                loss = network(changed[row], targets[row], reduction="none")
                torch.testing.assert_close(loss[:, :seen], expected[row, :seen], rtol=1e-4, atol=1e-3)
        if network.packs:
            document = torch.arange(2).repeat_interleave(torch.tensor([9, L - 9]))[None]
            position = torch.cat([torch.arange(9), torch.arange(L - 9)])[None]
            row = torch.cat([ids[:1, :9], ids[1:2, : L - 9]], dim=1)
            wanted = torch.cat([targets[:1, :9], targets[1:2, : L - 9]], dim=1)
            loss = network(row, wanted, position, document, packing_tables(document), reduction="none")
            alone = torch.cat([expected[:1, :9], expected[1:2, : L - 9]], dim=1)
            torch.testing.assert_close(loss, alone, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "attention", "said"),
    [
        ("codegen", "eager", "does not use transformers' attention interface"),
        ("bloom", "eager", "does not use transformers' attention interface"),
        ("gpt_neox_japanese", "eager", None),
        ("mpt", "eager", "does not use transformers' attention interface"),
        ("gptj", "eager", None),
        ("rwkv", "eager", None),
        ("qwen3", "trunkline", None),
    ],
)
def test_no_family_sees_the_future(family: str, attention: str, said: str | None, tmp_path: Path) -> None:
    network = made(family, tmp_path)
    assert network.attention == attention
    assert said is None or (network.attention_note is not None and said in network.attention_note)
    check(network, tmp_path)


@pytest.mark.parametrize(
    ("family", "attention", "message"),
    [
        ("codegen", "sdpa", 'CodeGenForCausalLM.*sdpa: .*set model.attention to "auto"'),
        ("bloom", "trunkline", 'BloomForCausalLM.*trunkline: .*set model.attention to "auto"'),
        ("xlnet", "auto", "XLNetLMHeadModel.*cannot be trained.*later tokens change the loss of earlier ones"),
        ("cpmant", "auto", "CpmAntForCausalLM.*later tokens change"),
        ("prophetnet", "auto", "its own loss is not the mean cross-entropy"),
    ],
)
def test_what_is_not_causal_or_has_another_loss_is_refused(
    family: str, attention: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        made(family, tmp_path, attention)


def test_dropout_is_left_out_of_the_trial_and_torch_s_generator_alone(tmp_path: Path) -> None:
    model = saved(tiny_config("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5), tmp_path)
    config = hf_config_of(model, 32)
    before = torch.get_rng_state()
    network = make_network(model, config)
    assert torch.equal(torch.get_rng_state(), before)
    assert network.attention == "sdpa"
    assert network.attention_note is None


def _families() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("family", _families())
def test_every_family_that_can_be_made_small_is_causal_or_refused(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    try:
        config = tiny_config(family)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
        if size > 5e6:
            pytest.skip("it has more sizes than are known here")
        AutoModelForCausalLM.from_config(config)(input_ids=torch.arange(4, 12)[None], use_cache=False)
    except Exception as error:
        pytest.skip(f"it cannot be made small: {error}")
    try:
        network = made(family, tmp_path)
    except ConfigError as error:
        if "cannot be trained to predict the next token" not in str(error):
            raise
        return
    check(network, tmp_path)
