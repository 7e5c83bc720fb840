"""flash_attention behind transformers' attention interface, against its own attention, and what is refused."""

import types

import pytest
import torch

from kernels.transformers_attention import attention_forward, register_with_transformers


@pytest.fixture(scope="module")
def models():
    """One small decoder with grouped key heads, with transformers' attention and with ours."""
    transformers = pytest.importorskip("transformers")
    register_with_transformers()
    config = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    made = []
    for name in ("eager", "trunkline"):
        torch.manual_seed(0)
        llama = transformers.LlamaConfig(**config, attn_implementation=name)
        made.append(transformers.LlamaForCausalLM(llama).eval())
    return made


def tokens():
    return torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("padded", ["", "left", "right"])
def test_a_decoder_gives_what_it_gives_with_eager_attention(models, padded):
    mask = torch.ones(2, 9, dtype=torch.long)
    if padded:
        mask[1, :4] = 0
        mask = mask if padded == "left" else mask.flip(1)
    results = []
    for model in models:
        model.zero_grad()
        logits = model(tokens(), attention_mask=mask).logits[mask.bool()]
        logits.square().mean().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_generation_with_a_cache_gives_the_same_tokens(models):
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    want, got = (m.generate(tokens(), attention_mask=mask, max_new_tokens=6, do_sample=False) for m in models)
    assert torch.equal(got, want)


def test_a_sliding_window_is_refused():
    transformers = pytest.importorskip("transformers")
    register_with_transformers()
    config = transformers.MistralConfig(
        vocab_size=50, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4, attn_implementation="trunkline",
    )  # fmt: skip
    with pytest.raises(ValueError, match="for another mask"):
        transformers.MistralForCausalLM(config)(tokens())


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("no dropout", {"dropout": 0.1}),
        ("no sliding_window", {"sliding_window": 4}),
        ("no softcap", {"softcap": 30.0}),
        (r"attention_mask must be \[batch, keys\]", {"attention_mask": torch.ones(2, 1, 5, 5)}),
        ("takes 1 query or as many as keys; got 5 for 7 keys", {"num_keys": 7}),
    ],
)
def test_what_cannot_be_done_is_named(message, arguments):
    arguments = {"attention_mask": None, "num_keys": 5, **arguments}
    query, key = torch.ones(2, 2, 5, 16), torch.ones(2, 2, arguments.pop("num_keys"), 16)
    with pytest.raises(ValueError, match=message):
        attention_forward(types.SimpleNamespace(is_causal=True), query, key, key, **arguments)
