"""Tokenizers of conversations: trained on the data, and where an answer ends by the chat template of any.

    train_tokenizer(texts, vocab_size)   byte-level BPE with ChatML as its chat template
    turn_ends(tokenizer)                 the special tokens that end an answer in its chat template
    stop_ids(tokenizer)                  the tokens at which generation must stop

transformers takes seconds to import, so it is imported where it is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from trunkline.engine.errors import ConfigError
from trunkline.models.text.bpe import byte_level_bpe
from trunkline.models.text.chat_template import Asked, render
from trunkline.models.text.sources import BadRecord
from trunkline.models.text.tokenizer import PROBE, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT, PAD, TURN_START, TURN_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD, TURN_START, TURN_END)
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
"""Every byte and every special token; what is above are merges."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, fewer where the texts hold fewer repeated pairs.

    A document ends with <|endoftext|>, the EOS token; a turn of a conversation ends with <|im_end|>. It has no BOS and
    no unknown token: every text can be written in bytes. The same texts in the same order give the same tokenizer.
    Raises ConfigError for a `vocab_size` below MIN_VOCAB_SIZE.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"a vocabulary of {vocab_size} tokens: use {MIN_VOCAB_SIZE} or more, for bytes and marks alone"
        )
    tokenizer = byte_level_bpe(texts, vocab_size, SPECIAL_TOKENS)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        extra_special_tokens=[TURN_START, TURN_END],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHATML
    return fast


def turn_ends(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The special tokens that end an answer in the chat template: the one that it writes after it, if any, or those
    that the turn of a user or a tool begins with directly after it."""
    if tokenizer.chat_template is None:
        return []
    exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    longer = [[*exchange, {"role": role, "content": "a"}] for role in ("user", "tool")]
    try:
        texts = render(tokenizer, exchange, [Asked(), *(Asked(others=messages) for messages in longer)], cpu_seconds=2)
    except BadRecord:  # rendering reports what it says
        return []
    # a template may refuse any of these exchanges, by an exception of its own
    after, *followed = (text[text.rfind(PROBE) + len(PROBE) :] if isinstance(text, str) else "" for text in texts)
    special = special_tokens(tokenizer)
    first = min(((after.index(mark), place) for place, mark in enumerate(special) if mark in after), default=None)
    found = [] if first is None else [special[first[1]]]
    own = after.removesuffix(tokenizer.eos_token)  # which some templates write once, after all turns
    if not any(mark in own for mark in special):
        heads = [text.removeprefix(own.rstrip()).lstrip() for text in followed]
        found += [next((mark for mark in special if head.startswith(mark)), "") for head in heads]
    return [mark for mark in dict.fromkeys(found) if mark]


def stop_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens that end a generated text: EOS, and those that end the assistant's turn in the chat template."""
    ends = [tokenizer.backend_tokenizer.token_to_id(mark) for mark in turn_ends(tokenizer)]
    return sorted({tokenizer.eos_token_id, *(number for number in ends if number is not None)})
