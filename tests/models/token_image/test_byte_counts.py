from __future__ import annotations

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from trunkline.models.text.byte_tokenizer import fast_bytes, plain_bytes
from trunkline.models.token_image.byte_counts import count_bytes

TEXT = "管道中的压力沿气流方向下降。né ﷽ 🎈 a gas network 压缩机再次提高压力。 " * 3


def merged() -> PreTrainedTokenizerFast:
    """Byte-level BPE that merges two bytes of a character, with an added token that is text."""
    tokenizer = plain_bytes()
    first, second = (tokenizer.convert_ids_to_tokens(byte) for byte in "管".encode()[:2])
    vocabulary = tokenizer.get_vocab() | {first + second: 256}
    backend = tokenizer.backend_tokenizer
    made = Tokenizer(models.BPE(vocabulary, [(first, second)]))
    made.pre_tokenizer, made.decoder = backend.pre_tokenizer, backend.decoder
    made.add_special_tokens([AddedToken("<eos>", special=True)])
    made.add_tokens([AddedToken("gas né")])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


def falling_back() -> PreTrainedTokenizerFast:
    """Characters, and bytes for what it does not know, as sentencepiece's."""
    pieces = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"aegknortws管压"]
    made = Tokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)}, [], byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token="<unk>")


MAKERS = {"bytes": plain_bytes, "byT5": lambda: fast_bytes(ByT5Tokenizer()), "BPE": merged, "fallback": falling_back}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("size", [1, 5, 64, 10_000])
def test_windows_that_cut_characters_have_the_bytes_of_the_text(name: str, size: int) -> None:
    tokenizer = MAKERS[name]()
    ids = np.array([*tokenizer(TEXT, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
    windows = [ids[at : at + size] for at in range(0, len(ids), size)]
    assert count_bytes(tokenizer, windows) == len(TEXT.encode())
    decoded = sum(len(tokenizer.decode(each.tolist(), skip_special_tokens=True).encode()) for each in windows)
    assert (decoded > len(TEXT.encode())) == (size < len(ids))


def test_no_space_before_a_comma_is_lost() -> None:
    """A tokenizer that cleans up what it decodes, and whose tokens are words."""
    made = Tokenizer(models.WordLevel({"<eos>": 0, "né": 1, ",": 2, "pipe": 3}))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", clean_up_tokenization_spaces=True)
    assert count_bytes(tokenizer, [np.array([1, 2, 3, 0])]) == len("né , pipe".encode())
