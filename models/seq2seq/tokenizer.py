"""A tokenizer for T5, trained on the data: PAD 0, EOS 1, byte-level BPE, and sentinels as its last tokens.

train_tokenizer(texts, vocab_size)   as transformers opens it
check_sizes(vocab_size, ...)         whether there is room for what it must hold
check_marks(tokenizer, folder)       whether a given one has the marks that a T5 needs
sentinels(tokenizer, vocab_size)     the ids of <extra_id_0>, <extra_id_1>, ...
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from trunkline.engine.errors import ConfigError
from trunkline.models.text.bpe import byte_level_bpe
from trunkline.models.text.tokenizer import vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS = "<pad>", "</s>"
NUM_SENTINELS = 100
_BYTES_END, _BYTES_UNUSED = 3 + 256, 11  # of byT5: behind the last byte; 0xf5 to 0xff
MIN_VOCAB_SIZE = 2 + 256
"""PAD, EOS and every byte; what is above are merges and sentinels."""


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, num_sentinels: int = NUM_SENTINELS, max_token_length: int | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, fewer where the texts hold fewer repeated pairs.

    It has no unknown token: every text can be written in bytes. The same texts in the same order give the same
    tokenizer. Digits are never merged. Raises ConfigError as `check_sizes` does.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    check_sizes(vocab_size, max_token_length, num_sentinels)
    tokenizer = byte_level_bpe(
        texts, vocab_size - num_sentinels, [PAD, EOS], single_digits=True, max_token_length=max_token_length
    )
    marks = [f"<extra_id_{number}>" for number in reversed(range(num_sentinels))]
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, extra_special_tokens=marks,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def check_sizes(vocab_size: int, max_token_length: int | None = None, num_sentinels: int = NUM_SENTINELS) -> None:
    """Raises ConfigError for a vocabulary that has no room for bytes and marks, and for tokens of no characters."""
    if vocab_size < MIN_VOCAB_SIZE + num_sentinels:
        raise ConfigError(
            f"--vocab-size {vocab_size}: use {MIN_VOCAB_SIZE + num_sentinels} or more, for PAD, EOS, bytes and "
            f"{num_sentinels} sentinels alone"
        )
    if max_token_length is not None and max_token_length < 1:
        raise ConfigError(f"--max-token-length {max_token_length}: use 1 or more characters")


def check_marks(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Raises ConfigError for a tokenizer without PAD, with which a decoder starts, or with one token for PAD and EOS.

    That it has EOS is known (trunkline.models.text.tokenizer.load_tokenizer).
    """
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"{folder}: the tokenizer has no PAD token, with which a decoder starts: set pad_token in its "
            "tokenizer_config.json"
        )
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ConfigError(
            f"{folder}: PAD and EOS are one token, so that an answer would never be seen to end: set pad_token in its "
            "tokenizer_config.json to another one"
        )


def sentinels(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> list[int]:
    """What stands for spans 0, 1, ... that are taken out of a text, in this order.

    The ids of <extra_id_0>, <extra_id_1>, ..., which mT5 spells with a mark of space before it. byT5 was pre-trained
    with the bytes from 0xff on, descending: as far as UTF-8 has none. Where the tokenizer has no such tokens, the last
    of the model's `vocab_size` ids, descending, as far as no token of the tokenizer has them.
    """
    known = tokenizer.get_vocab()
    if [known.get(f"<extra_id_{number}>") for number in range(2)] == [_BYTES_END, _BYTES_END + 1]:
        return list(range(_BYTES_END - 1, _BYTES_END - 1 - _BYTES_UNUSED, -1))
    for spelling in ("<extra_id_{}>", "▁<extra_id_{}>"):
        found: list[int] = []
        while (number := known.get(spelling.format(len(found)))) is not None:
            found.append(number)
        if found:
            return found
    return list(range(vocab_size - 1, vocabulary_size(tokenizer) - 1, -1))
