from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.models.seq2seq.toy_data import write_lines
from trunkline.engine.errors import ConfigError
from trunkline.models.seq2seq.prepare import prepare
from trunkline.models.text.tokenizer import load_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path / "byt5")
    return tmp_path / "byt5"


def test_every_text_has_the_tokens_that_transformers_gives(folder: Path) -> None:
    from transformers import ByT5Tokenizer

    slow: Any = ByT5Tokenizer.from_pretrained(folder)
    fast = load_tokenizer(folder)
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


def test_a_store_keeps_its_files(folder: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "t.jsonl", *({"prompt": f"é{number}", "response": "a"} for number in range(9)))
    val = write_lines(tmp_path / "v.jsonl", {"prompt": "x", "response": "y"})
    store, _ = prepare([source], tmp_path / "s", tokenizer=folder, val_sources=[val])
    assert store.vocab_size == 384
    assert store.column("train", "input").tokens(3).tolist() == [byte + 3 for byte in "é3".encode()]
    names = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in (store.root / "tokenizer").iterdir()) == names
    assert all((store.root / "tokenizer" / name).read_bytes() == (folder / name).read_bytes() for name in names)
    assert store.tokenizer().decode(store.column("train", "input").tokens(3)) == "é3"
    assert not prepare([source], tmp_path / "s", tokenizer=folder, val_sources=[val])[1]


def test_one_with_other_marks_is_refused(folder: Path) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer(pad_token="<blank>").save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"]["0"]["content"] = "<other>"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"byt5: not a tokenizer that can be loaded \(its first tokens are"):
        load_tokenizer(folder)
