from __future__ import annotations

import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trunkline.engine.errors import ConfigError
from trunkline.models.causal_lm.tokenizer import MIN_VOCAB_SIZE, stop_ids, train_tokenizer
from trunkline.models.text.tokenizer import leading_ids, load_tokenizer, pad_id, tokenizer_digest, vocabulary_size

TEXTS = ["the cat sat on the mat; the cat ate the rat", "a naïve café 🤗", "tabs\tand\n\nlines  "] * 3


def foreign(
    folder: Path, *, eos: str | None = "</s>", bos: bool = False, truncation: int = 0
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer as another project might have saved it."""
    words = ["<s>", "</s>", "<unk>", "hello", "world"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    if truncation:
        tokenizer.enable_truncation(truncation)
        tokenizer.enable_padding(length=truncation)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token="<s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return fast


def test_every_text_survives_the_trained_tokenizer() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    assert vocabulary_size(tokenizer) == len(tokenizer) == 300
    for text in [*TEXTS, "Ωmega\x00\u202e 漢字", " "]:
        ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text


def test_the_trained_tokenizer_ends_documents_and_turns_with_different_tokens() -> None:
    tokenizer = train_tokenizer(TEXTS, MIN_VOCAB_SIZE)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|endoftext|>", "<|pad|>", None)
    assert leading_ids(tokenizer) == []
    assert stop_ids(tokenizer) == sorted(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
    assert pad_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|pad|>")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


def test_the_same_texts_train_the_same_tokenizer_and_it_survives_saving(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(iter(TEXTS), 290)
    assert tokenizer_digest(train_tokenizer(TEXTS, 290)) == tokenizer_digest(tokenizer)
    assert tokenizer_digest(train_tokenizer(TEXTS, 291)) != tokenizer_digest(tokenizer)
    tokenizer.save_pretrained(tmp_path / "one")
    loaded = load_tokenizer(tmp_path / "one")
    assert tokenizer_digest(loaded) == tokenizer_digest(tokenizer)
    loaded.save_pretrained(tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


def test_a_vocabulary_without_room_for_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match="a vocabulary of 259 tokens: use 260 or more"):
        train_tokenizer(TEXTS, 259)


def test_a_loaded_tokenizer_neither_truncates_nor_pads(tmp_path: Path) -> None:
    foreign(tmp_path, truncation=2)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.backend_tokenizer.encode("hello").ids == [3]
    assert tokenizer.backend_tokenizer.encode("hello world hello").ids == [3, 4, 3]


@pytest.mark.parametrize("bos", [False, True])
def test_bos_leads_only_where_the_tokenizer_writes_it(tmp_path: Path, bos: bool) -> None:
    foreign(tmp_path, bos=bos)
    tokenizer = load_tokenizer(tmp_path)
    assert leading_ids(tokenizer) == ([0] if bos else [])
    assert stop_ids(tokenizer) == [1]
    assert pad_id(tokenizer) == 1, "EOS, since there is no padding token"


def test_ids_with_gaps_need_an_embedding_up_to_the_last(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"hello": 0, "</s>": 9}, unk_token="hello")).save(str(tmp_path / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="</s>")
    assert vocabulary_size(tokenizer) == 10


def test_folders_without_a_usable_tokenizer_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"holds no tokenizer \(no tokenizer\.json\)"):
        load_tokenizer(tmp_path)
    foreign(tmp_path / "no-eos", eos=None)
    with pytest.raises(ConfigError, match="no-eos: the tokenizer has no EOS token: set eos_token"):
        load_tokenizer(tmp_path / "no-eos")
    foreign(tmp_path / "cut")
    text = (tmp_path / "cut/tokenizer.json").read_text()
    (tmp_path / "cut/tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(ConfigError, match="cut: not a tokenizer that can be loaded"):
        load_tokenizer(tmp_path / "cut")


def test_a_pipe_in_a_folder_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match="it is a named pipe, where a file is expected"):
        load_tokenizer(tmp_path)
