"""Hugging Face's fast tokenizers from a folder, and byT5's.

    load_tokenizer(folder)          checked; nothing is downloaded and no code of the folder runs
    vocabulary_size(tokenizer)      ids are 0 ... vocabulary_size - 1
    tokenizer_digest(tokenizer)     names what it does
    vocabulary_digest(tokenizer)    names which of its tokens is which
    special_tokens(tokenizer)       their texts
    leading_ids(tokenizer)          what it puts before every text
    pad_id(tokenizer)               a token to fill up batches with
    check_ids(tokenizer, folder)    raises where an id means something else to the model of a folder

transformers takes seconds to import, so it is imported where it is needed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline.engine.errors import ConfigError
from trunkline.engine.machine.reading import check_regular
from trunkline.models.text.byte_tokenizer import fast_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROBE = "zqxj"
"""A text that is like no other."""

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


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
    from transformers import AutoTokenizer, ByT5Tokenizer

    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder: give a folder that holds a Hugging Face tokenizer")
    if not holds_tokenizer(folder):
        raise ConfigError(
            f"{folder}: holds no tokenizer (no tokenizer.json): give the folder of a Hugging Face tokenizer"
        )
    try:
        check_regular(folder)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if type(tokenizer) is ByT5Tokenizer:
            tokenizer = fast_bytes(tokenizer)
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


def vocabulary_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of its tokens and their ids, hexadecimal."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def leading_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The BOS token, if the tokenizer puts one before every text, or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer.backend_tokenizer.encode(PROBE).ids[:1] == [bos] else []


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The special tokens, the longest first; other added tokens are ordinary text."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*tokenizer.all_special_tokens, *added}, key=lambda text: (-len(text), text))


def special_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens that stand for no text; other added tokens do."""
    added = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
    return sorted({*tokenizer.all_special_ids, *added})


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The padding token, or EOS where there is none; which one matters to nothing, since padding is masked."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def check_ids(tokenizer: PreTrainedTokenizerFast, folder: Path, store: str) -> None:
    """An id must mean what it means to the model of `folder`, if that has a tokenizer; new tokens may be added.

    Raises ConfigError that names the store whose tokenizer it is.
    """
    if not holds_tokenizer(folder):
        return
    known = {number: token for token, number in open_tokenizer(folder).get_vocab().items()}
    for number, token in sorted((number, token) for token, number in tokenizer.get_vocab().items()):
        if known.get(number, token) != token:
            raise ConfigError(
                f"data.store: {store}: its token {number} is {token!r}, but {known[number]!r} to the model of "
                f"{folder}: prepare the data with --tokenizer {folder}"
            )
