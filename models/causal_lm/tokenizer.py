"""Tokenizers: Hugging Face's fast ones from a folder, or trained on the data.

    load_tokenizer(folder)               checked; nothing is downloaded and no code of the folder runs
    train_tokenizer(texts, vocab_size)   byte-level BPE with ChatML as its chat template
    vocabulary_size(tokenizer)           ids are 0 ... vocabulary_size - 1
    tokenizer_digest(tokenizer)          names what it does
    special_tokens(tokenizer)            their texts
    turn_ends(tokenizer)                 the texts of those that end an answer in its chat template
    stop_ids(tokenizer)                  the tokens at which generation must stop
    pad_id(tokenizer)                    a token to fill up batches with

transformers takes seconds to import, so it is imported where it is needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline.engine.errors import ConfigError
from trunkline.engine.machine.reading import check_regular
from trunkline.models.causal_lm.chat_template import Asked, render
from trunkline.models.causal_lm.records import BadRecord

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

_PROBE = "zqxj"
_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens, fewer where the texts hold fewer repeated pairs.

    A document ends with <|endoftext|>, the EOS token; a turn of a conversation ends with <|im_end|>. It has no BOS and
    no unknown token: every text can be written in bytes. The same texts in the same order give the same tokenizer.
    Raises ConfigError for a `vocab_size` below MIN_VOCAB_SIZE.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"a vocabulary of {vocab_size} tokens: use {MIN_VOCAB_SIZE} or more, for bytes and marks alone"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        extra_special_tokens=[TURN_START, TURN_END],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHATML
    return fast


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder holds any file that tells of a tokenizer."""
    return any((folder / name).is_file() for name in _FILES)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The Hugging Face tokenizer in `folder`, without the truncation and padding that its file may ask for.

    Raises ConfigError if there is none, if it is not a fast one or if it has no EOS token.
    """
    tokenizer = open_tokenizer(folder)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{folder}: the tokenizer has no EOS token: set eos_token in its tokenizer_config.json")
    return tokenizer


def open_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The same, but it may lack an EOS token. Raises ConfigError."""
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder: give a folder that holds a Hugging Face tokenizer")
    if not holds_tokenizer(folder):
        raise ConfigError(
            f"{folder}: holds no tokenizer (no tokenizer.json): give the folder of a Hugging Face tokenizer"
        )
    try:
        check_regular(folder)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise almost anything for a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{folder}: not a tokenizer that can be loaded ({reason}): copy the whole folder again; code of a "
            "folder never runs here"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"{folder}: a slow tokenizer: save it as a fast one, with a tokenizer.json")
    for name in ("is_local", "local_files_only", "name_or_path"):  # how it was loaded is no part of what is saved
        tokenizer.init_kwargs.pop(name, None)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """The largest id + 1, which is len(tokenizer) unless its ids have gaps: what a model's embedding must have."""
    return max(tokenizer.get_vocab().values()) + 1


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """Names everything that decides how records become tokens: SHA-256, hexadecimal."""
    content = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def leading_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The BOS token, if the tokenizer puts one before every text, or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer.backend_tokenizer.encode(_PROBE).ids[:1] == [bos] else []


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The special tokens, the longest first; other added tokens are ordinary text."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*tokenizer.all_special_tokens, *added}, key=lambda text: (-len(text), text))


def turn_ends(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The special tokens that end an answer in the chat template: the one that it writes after it, if any, or those
    that the turn of a user or a tool begins with directly after it."""
    if tokenizer.chat_template is None:
        return []
    exchange = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
    longer = [[*exchange, {"role": role, "content": "a"}] for role in ("user", "tool")]
    try:
        texts = render(tokenizer, exchange, [Asked(), *(Asked(others=messages) for messages in longer)], cpu_seconds=2)
    except BadRecord:  # rendering reports what it says
        return []
    # a template may refuse any of these exchanges, by an exception of its own
    after, *followed = (text[text.rfind(_PROBE) + len(_PROBE) :] if isinstance(text, str) else "" for text in texts)
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


def special_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens that stand for no text; other added tokens do."""
    added = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
    return sorted({*tokenizer.all_special_ids, *added})


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The padding token, or EOS where there is none; which one matters to nothing, since padding is masked."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
