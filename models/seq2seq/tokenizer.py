"""A tokenizer for T5, trained on the data: PAD 0, EOS 1, byte-level BPE, and sentinels as its last tokens.

train_tokenizer(texts, vocab_size)   as transformers opens it
sentinels(tokenizer)                 the ids of <extra_id_0>, <extra_id_1>, ...
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from trunkline.engine.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS = "<pad>", "</s>"
NUM_SENTINELS = 100
MIN_VOCAB_SIZE = 2 + 256
"""PAD, EOS and every byte; what is above are merges and sentinels."""


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, num_sentinels: int = NUM_SENTINELS, max_token_length: int | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, fewer where the texts hold fewer repeated pairs.

    It has no unknown token: every text can be written in bytes. The same texts in the same order give the same
    tokenizer. Digits are never merged. Raises ConfigError for a `vocab_size` that has no room for bytes and marks.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < MIN_VOCAB_SIZE + num_sentinels:
        raise ConfigError(
            f"a vocabulary of {vocab_size} tokens: use {MIN_VOCAB_SIZE + num_sentinels} or more, for bytes and "
            f"{num_sentinels} sentinels alone"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - num_sentinels,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=max_token_length,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    marks = [f"<extra_id_{number}>" for number in reversed(range(num_sentinels))]
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, extra_special_tokens=marks,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def sentinels(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids of <extra_id_0>, <extra_id_1>, ... as far as they are there."""
    known = tokenizer.get_vocab()
    found: list[int] = []
    while (number := known.get(f"<extra_id_{len(found)}>")) is not None:
        found.append(number)
    return found
