"""Byte-level BPE, trained on texts.

byte_level_bpe(texts, vocab_size, marks)   as the tokenizers library has it; every text can be written in it
train_tokenizer(texts, vocab_size)         the same as transformers has it, with EOS as its only mark
check_size(vocab_size)                     whether the second has room for EOS and every byte
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from trunkline.engine.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

EOS = "<|endoftext|>"
MIN_VOCAB_SIZE = 1 + 256


def byte_level_bpe(
    texts: Iterable[str], vocab_size: int, marks: Sequence[str], *, single_digits: bool = False,
    max_token_length: int | None = None,
) -> Tokenizer:  # fmt: skip
    """At most `vocab_size` tokens, fewer where the texts hold fewer repeated pairs: `marks`, bytes and merges.

    single_digits: digits are never merged
    max_token_length: characters of a token at most

    The same texts in the same order give the same tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if single_digits:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    else:
        tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(marks), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=max_token_length, show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """See the top of this file. Raises ConfigError as `check_size` does."""
    from transformers import PreTrainedTokenizerFast

    check_size(vocab_size)
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(texts, vocab_size, [EOS]), eos_token=EOS, clean_up_tokenization_spaces=False
    )


def check_size(vocab_size: int) -> None:
    """Raises ConfigError for a vocabulary that has no room for EOS and every byte."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(f"--vocab-size {vocab_size}: use {MIN_VOCAB_SIZE} or more, for EOS and every byte alone")
