from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.seq2seq.toy_data import write_lines
from trunkline.engine.errors import ConfigError
from trunkline.models.seq2seq.byte_tokenizer import byte_tokenizer, is_byte_tokenizer
from trunkline.models.seq2seq.prepare import prepare


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path / "byt5")
    return tmp_path / "byt5"


def test_every_text_has_the_tokens_that_transformers_gives(folder: Path) -> None:
    from transformers import ByT5Tokenizer

    slow: Any = ByT5Tokenizer.from_pretrained(folder)
    fast = byte_tokenizer(folder)
    rng = np.random.default_rng(0)
    every = [chr(number) for number in range(1, 0x3000)]
    texts = ["", " a  b\n\tc ", "naïve 数字 🙂", *("".join(rng.choice(every, 40)) for _ in range(200))]
    for text in texts:
        ids = fast(text, add_special_tokens=False)["input_ids"]
        assert ids == slow(text, add_special_tokens=False)["input_ids"]
        assert fast.decode(ids) == text
    assert len(fast) == len(slow) == 384
    assert fast.all_special_ids == slow.all_special_ids
    assert fast.convert_tokens_to_ids("<extra_id_7>") == slow.convert_tokens_to_ids("<extra_id_7>")


def test_a_store_keeps_it(folder: Path, tmp_path: Path) -> None:
    assert is_byte_tokenizer(folder)
    source = write_lines(tmp_path / "t.jsonl", *({"prompt": f"é{number}", "response": "a"} for number in range(9)))
    val = write_lines(tmp_path / "v.jsonl", {"prompt": "x", "response": "y"})
    store, _ = prepare([source], tmp_path / "s", tokenizer=folder, val_sources=[val])
    assert store.vocab_size == 384
    assert store.inputs("train").tokens(3).tolist() == [byte + 3 for byte in "é3".encode()]
    assert not is_byte_tokenizer(store.root / "tokenizer")
    assert not prepare([source], tmp_path / "s", tokenizer=folder, val_sources=[val])[1]
    again, is_new = prepare([source], tmp_path / "s2", tokenizer=store.root / "tokenizer", val_sources=[val])
    assert is_new
    assert again.arrays == store.arrays


def test_a_damaged_one_is_named(folder: Path) -> None:
    (folder / "added_tokens.json").write_text("{")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer", "extra_ids": "x"}')
    with pytest.raises(ConfigError, match="byt5: not a tokenizer that can be loaded"):
        byte_tokenizer(folder)
