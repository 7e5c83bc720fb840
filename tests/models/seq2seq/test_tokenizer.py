from __future__ import annotations

from typing import Any

import pytest

from trunkline.engine.errors import ConfigError
from trunkline.models.seq2seq.tokenizer import check_sizes, sentinels, train_tokenizer
from trunkline.models.text.byte_tokenizer import fast_bytes


def t5(pieces: list[str], extra_ids: int) -> Any:
    from transformers import T5TokenizerFast

    make: Any = T5TokenizerFast
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -1.0) for piece in pieces)]
    return make(vocab=vocabulary, extra_ids=extra_ids)


def test_sentinels_are_the_tokenizer_s_by_name_or_the_model_s_last_free_ids() -> None:
    trained = train_tokenizer(["gas in a pipe"], 400, num_sentinels=3)
    assert sentinels(trained, 1000) == [len(trained) - 1, len(trained) - 2, len(trained) - 3]
    assert sentinels(t5(["a", "b"], 4), 1000) == [5, 6, 7, 8]
    mt5 = t5(["a", "▁<extra_id_1>", "▁<extra_id_0>", "b"], 0)
    assert sentinels(mt5, 1000) == [5, 4]
    assert sentinels(t5(["a", "b"], 0), 8) == [7, 6, 5]
    assert sentinels(t5(["a", "b"], 0), 5) == []


def test_the_same_texts_give_the_same_tokenizer() -> None:
    texts = ["pressure falls along the pipe"] * 5
    one, other = (train_tokenizer(texts, 400).backend_tokenizer.to_str() for _ in range(2))
    assert one == other


def test_every_text_can_be_written() -> None:
    tokenizer = train_tokenizer(["a"], 358)
    for text in ("", " two  spaces", "naïve 数字 🙂\n\t", "12 345"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_sizes_without_room_are_refused() -> None:
    check_sizes(358, 1)
    with pytest.raises(ConfigError, match="--vocab-size 357: use 358 or more, for PAD, EOS, bytes and 100 sentinels"):
        check_sizes(357)
    with pytest.raises(ConfigError, match="--max-token-length 0"):
        check_sizes(400, 0)


def test_spans_of_byt5_are_bytes_that_no_text_has() -> None:
    from transformers import ByT5Tokenizer

    found = sentinels(fast_bytes(ByT5Tokenizer()), 384)
    assert found == list(range(258, 247, -1))
    assert not {number - 3 for number in found} & set(
        "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000)))).encode()
    )
