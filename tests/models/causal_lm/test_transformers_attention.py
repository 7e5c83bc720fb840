"""flash_attention behind transformers' attention interface, against its own attention, and what is refused."""

import types

import pytest
import torch

from trunkline.kernels.attention.packed import packing_tables
from trunkline.models.causal_lm.transformers_attention import attention_forward, register_with_transformers


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


def packed():
    """(documents, their tokens, numbers and positions in three rows of 24), of which the last row is padding."""
    lengths = [[5, 1, 17], [24], []]
    generator = torch.Generator().manual_seed(0)
    documents = [[torch.randint(1, 50, (n,), generator=generator) for n in row] for row in lengths]
    ids, document, position = torch.zeros(3, 24, dtype=torch.long), torch.full((3, 24), -1), torch.zeros(3, 24)
    for b, row in enumerate(documents):
        start = 0
        for i, tokens in enumerate(row):
            at = slice(start, start := start + len(tokens))
            ids[b, at], document[b, at], position[b, at] = tokens, i, torch.arange(float(len(tokens)))
    return documents, ids, document, position.long()


@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_documents_give_what_each_gives_alone(models, use_cache):
    documents, ids, document, position = packed()
    _, model = models
    model.zero_grad()
    arguments = {"attention_mask": document >= 0, "position_ids": position, "use_cache": use_cache}
    got = model(ids, **arguments, packing=packing_tables(document)).logits[document >= 0]
    got.square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    want = torch.cat([model(tokens[None]).logits[0] for row in documents for tokens in row])
    want.square().mean().backward()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for ours, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)


def test_packed_documents_give_what_sdpa_gives_with_a_mask_of_blocks(models):
    _, ids, document, position = packed()
    eager, model = models
    ours = model(ids, attention_mask=document >= 0, position_ids=position, packing=packing_tables(document)).logits
    eager.set_attn_implementation("sdpa")
    try:
        seen = (document[:, :, None] == document[:, None, :]).tril()[:, None]
        theirs = eager(ids, attention_mask=seen, position_ids=position).logits
    finally:
        eager.set_attn_implementation("eager")
    torch.testing.assert_close(ours[document >= 0], theirs[document >= 0], rtol=1e-5, atol=1e-5)
    assert ours.isfinite().all()


def test_packed_positions_without_a_mask_are_refused(models):
    _, ids, document, position = packed()
    with pytest.raises(ValueError, match="give attention_mask and packing"):
        models[1](ids, position_ids=position, use_cache=False, packing=packing_tables(document))


def test_packing_with_a_cache_is_refused(models):
    _, ids, document, _ = packed()
    past = models[1](ids[:, :4], attention_mask=torch.ones(3, 4)).past_key_values
    with pytest.raises(ValueError, match=r"without a cache; got is_causal=True, 1 queries and 5 keys"):
        models[1](
            ids[:, 4:5], attention_mask=torch.ones(3, 5), past_key_values=past, packing=packing_tables(document[:, 4:5])
        )


def test_padding_behind_needs_no_mask(models):
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    with_mask, without = (models[1](tokens(), attention_mask=m, use_cache=False).logits for m in (mask, None))
    torch.testing.assert_close(without[mask.bool()], with_mask[mask.bool()], rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("scaling", [torch.tensor(0.25), True, float("nan")])
def test_a_scaling_that_is_no_number_above_0_is_refused(scaling):
    q = k = v = torch.ones(1, 2, 4, 16)
    with pytest.raises(ValueError, match="softmax_scale must be a number"):
        attention_forward(torch.nn.Module(), q, k, v, None, scaling=scaling)
