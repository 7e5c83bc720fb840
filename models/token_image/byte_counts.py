"""How many bytes of text tokens stand for, exactly where a token is of bytes: a window may cut a character.

    count_bytes(tokenizer, windows)     of stretches of tokens from anywhere in texts

A byte of a cut character would be decoded to U+FFFD, which has three.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from trunkline.models.text.tokenizer import special_ids, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BYTE = re.compile("<0x[0-9A-F]{2}>")  # what sentencepiece falls back to
_UNKNOWN = -1


def count_bytes(tokenizer: PreTrainedTokenizerFast, windows: Iterable[np.ndarray]) -> int:
    """Of int64 [n] each. A special token has none. One whose bytes depend on its neighbours is decoded with them."""
    table, total = _bytes_by_token(tokenizer), 0
    for window in windows:
        counts = table[window]
        total += int(counts.clip(min=0).sum())
        if len(rest := window[counts == _UNKNOWN]):
            plain: Any = tokenizer.decode(rest.tolist(), clean_up_tokenization_spaces=False)
            total += len(plain.encode())
    return total


def _bytes_by_token(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """int64 [V], -1 where the decoder alone knows."""
    decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    is_byte_level, falls_back = '"ByteLevel"' in decoder, '"ByteFallback"' in decoder
    table = np.full(vocabulary_size(tokenizer), _UNKNOWN)
    for token, number in tokenizer.get_vocab().items():
        if is_byte_level:  # a letter stands for a byte
            table[number] = len(token)
        elif falls_back and _BYTE.fullmatch(token):
            table[number] = 1
    if is_byte_level:
        for number, added in tokenizer.added_tokens_decoder.items():
            table[number] = len(added.content.encode())
    table[special_ids(tokenizer)] = 0
    return table
