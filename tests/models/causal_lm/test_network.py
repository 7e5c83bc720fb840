"""The network against transformers' own logits: padded, packed, with and without the fused head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.models.causal_lm import families
from trunkline.engine.errors import CheckpointError, ConfigError
from trunkline.kernels.attention.packed import packing_tables
from trunkline.models.causal_lm.build import attentions_of, hf_config_of, make_network
from trunkline.models.causal_lm.config import CausalLMModel, Pretrain
from trunkline.models.causal_lm.network import CausalLM

PRETRAIN = Pretrain(type="pretrain")
SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 48,
}  # fmt: skip


def llama(**keys: Any) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLMModel(objective=PRETRAIN, **SHAPE, **keys)
    return make_network(model, hf_config_of(model, 64))


def saved(config: Any, folder: Path) -> CausalLMModel:
    """A model of any transformers configuration, saved to a folder."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return CausalLMModel(objective=PRETRAIN, path=str(folder))


def rows() -> dict[str, torch.Tensor]:
    """Two rows of packed documents: 5, 17 and 8 tokens, and 30; two of padding behind them."""
    generator = torch.Generator().manual_seed(1)
    document = torch.full((2, 32), -1)
    positions = torch.zeros(2, 32, dtype=torch.int64)
    targets = torch.full((2, 32), -100)
    ids = torch.randint(97, (2, 32), generator=generator)
    for row, lengths in enumerate([(5, 17, 8), (30,)]):
        start = 0
        for number, length in enumerate(lengths):
            span = slice(start, start + length)
            document[row, span], positions[row, span] = number, torch.arange(length)
            targets[row, start : start + length - 1] = ids[row, start + 1 : start + length]
            start += length
    return {"input_ids": ids, "targets": targets, "position_ids": positions, "document": document}


def one_by_one(lm: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """-log p of every target, document by document, from the logits of transformers' model alone."""
    loss = torch.zeros(batch["targets"].shape)
    for row in range(len(loss)):
        for number in range(int(batch["document"][row].max()) + 1):
            of = batch["document"][row] == number
            logits = lm(input_ids=batch["input_ids"][row, of][None]).logits[0]
            loss[row, of] = F.cross_entropy(logits, batch["targets"][row, of], reduction="none", ignore_index=-100)
    return loss


@pytest.mark.parametrize("attention", ["trunkline", "sdpa", "eager"])
def test_packed_documents_have_the_loss_that_each_has_alone(attention: str) -> None:
    network, batch = llama(attention=attention), rows()
    loss = network(**batch, packing=packing_tables(batch["document"]), reduction="none")
    expected = one_by_one(network.lm, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    total = network(**batch, packing=packing_tables(batch["document"]))
    torch.testing.assert_close(total, expected.sum(), rtol=1e-6, atol=0)


def test_gradients_of_the_fused_head_are_those_of_the_logits() -> None:
    fused, plain = llama(), llama()
    plain.fused = False
    batch = {key: value for key, value in rows().items() if key in ("input_ids", "targets")}
    for network in (fused, plain):
        network(**batch).backward()
    for (name, one), two in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert one.grad is not None
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-6, msg=name)


WIDTHS = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
}  # fmt: skip
GROUPED = WIDTHS | {"num_key_value_heads": 1}


@pytest.mark.parametrize(
    ("family", "keys", "attention", "fused", "packs"),
    [
        ("Mistral", GROUPED | {"sliding_window": None}, "trunkline", True, True),
        ("Qwen2", GROUPED, "trunkline", True, True),
        ("Qwen2Moe", GROUPED | {"num_experts": 4, "moe_intermediate_size": 16}, "sdpa", True, True),  # no plain mask
        ("GPT2", {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 2}, "sdpa", True, True),  # dropout
        ("Falcon", {key: WIDTHS[key] for key in list(WIDTHS)[:4]}, "sdpa", True, True),  # attentions of its own
        ("StableLm", WIDTHS | {"num_key_value_heads": 2}, "sdpa", True, True),  # does not hand tables down
        ("Gemma2", GROUPED | {"head_dim": 16, "final_logit_softcapping": 3.0}, "eager", False, True),  # caps
        ("Granite", GROUPED | {"logits_scaling": 4.0}, "trunkline", False, True),  # divides its logits
        ("Bert", WIDTHS | {"is_decoder": True}, "trunkline", False, True),  # has more than a layer for a head
        ("Roberta", WIDTHS | {"is_decoder": True, "pad_token_id": 1}, "trunkline", False, False),  # counts positions
    ],
)
def test_any_family_has_its_own_loss(
    family: str, keys: dict[str, Any], attention: str, fused: bool, packs: bool, tmp_path: Path
) -> None:
    import transformers

    model = saved(getattr(transformers, f"{family}Config")(**keys), tmp_path)
    network = make_network(model, hf_config_of(model, 32)).eval()
    assert (network.attention, network.fused, network.packs) == (attention, fused, packs)
    with torch.no_grad():
        for parameter in network.parameters():  # untrained, a model's layers hardly show in its loss
            parameter.mul_(3)
        batch = rows()
        expected = one_by_one(network.lm, batch)
        alone = network(batch["input_ids"][1:, :30], batch["targets"][1:, :30], reduction="none")
        torch.testing.assert_close(alone, expected[1:, :30], rtol=1e-5, atol=1e-5)
        if packs:
            loss = network(**batch, packing=packing_tables(batch["document"]), reduction="none")
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


def test_trying_a_model_leaves_its_weights_alone(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    model = saved(LlamaConfig(**GROUPED), tmp_path)
    network = make_network(model, hf_config_of(model, 32))
    written = load_file(tmp_path / "model.safetensors")
    found = {name: value for name, value in network.lm.state_dict().items() if name in written}
    assert found.keys() == written.keys()
    assert all(torch.equal(found[name], written[name]) for name in written)


def test_padding_on_the_right_changes_nothing() -> None:
    network, batch = llama(), rows()
    ids, targets = batch["input_ids"][1:, :30], batch["targets"][1:, :30]
    longer = F.pad(ids, (0, 34), value=5), F.pad(targets, (0, 34), value=-100)
    torch.testing.assert_close(network(*longer), network(ids, targets), rtol=1e-6, atol=0)


def test_a_folder_is_read_with_what_it_holds_and_mistakes_are_named(tmp_path: Path) -> None:
    network = llama()
    network.lm.save_pretrained(tmp_path / "good")
    model = CausalLMModel(objective=PRETRAIN, path=str(tmp_path / "good"))
    again = make_network(model, hf_config_of(model, 64))
    for (name, one), two in zip(network.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name
    with pytest.raises(ConfigError, match=r"data.max_length is 65, but the model of .* knows 64 positions"):
        hf_config_of(model, 65)
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        hf_config_of(CausalLMModel(objective=PRETRAIN, path=str(tmp_path / "absent")), 64)
    config = hf_config_of(model, 64)
    config.num_hidden_layers = 3
    with pytest.raises(CheckpointError, match=r"its weights do not fit its config.json.*layers\.2"):
        make_network(model, config)
    (tmp_path / "good/config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"good/config\.json: cannot be read: JSONDecodeError"):
        hf_config_of(model, 64)


def test_attention_is_what_the_user_names() -> None:
    model = CausalLMModel(objective=PRETRAIN, **SHAPE, attention="eager")
    assert attentions_of(model, hf_config_of(model, 64)) == ["eager"]


@pytest.mark.parametrize("packed", [False, True])
def test_activations_are_counted_without_memory(packed: bool) -> None:
    """On fake tensors, which have no values to look at, as the plan of a run does."""
    from torch._subclasses import FakeTensorMode

    network, batch = llama(), rows()
    inputs = batch | packing_tables(batch["document"]) if packed else {k: batch[k] for k in ("input_ids", "targets")}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in inputs.items()}
        tables = {name: fake.pop(name) for name in list(fake) if "pack_" in name or name == "repack"}
        loss = network(**fake, packing=tables or None)
    assert loss.shape == ()


def test_a_compiled_model_has_the_same_loss() -> None:
    network, batch = llama(), rows()
    inputs = {name: batch[name] for name in ("input_ids", "targets")}
    expected = network(**inputs)
    network.compile(backend="eager")
    torch.testing.assert_close(network(**inputs), expected)


def test_an_attention_that_cannot_be_built_is_named_with_the_reason(tmp_path: Path) -> None:
    model = families.saved(families.tiny_config("gpt_neo"), tmp_path)
    network = make_network(model, hf_config_of(model, 64))
    assert network.attention == "eager"
    assert (network.attention_note or "").startswith(f"{attentions_of(model, network.lm.config)[0]} is not used: ")
