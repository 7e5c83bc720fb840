"""byT5's tokenizer, which transformers has in Python alone, as a fast one with the same tokens.

    is_byte_tokenizer(folder)     whether a folder's tokenizer is one
    byte_tokenizer(folder)        the same as a fast one, which a store keeps

PAD, EOS and the unknown token come first, then each byte, then <extra_id_0>, ...
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline.engine.errors import ConfigError
from trunkline.models.text.folder import brief
from trunkline.models.text.tokenizer_files import tokenizer_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def is_byte_tokenizer(folder: Path) -> bool:
    """Whether the folder's settings name byT5's class. Raises ConfigError for settings that cannot be read."""
    return folder.is_dir() and tokenizer_settings(folder).get("tokenizer_class") == "ByT5Tokenizer"


def byte_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Raises ConfigError for a folder that transformers does not load, or that holds further tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    try:
        slow: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        known = {number: token for token, number in slow.get_vocab().items()}
        marks, extra = ([known[number] for number in numbers] for numbers in (range(3), range(259, len(known))))
    except Exception as error:  # transformers raises almost anything for a damaged file
        raise ConfigError(f"{folder}: not a tokenizer that can be loaded ({brief(error)}): copy it again") from error
    if marks != [slow.pad_token, slow.eos_token, slow.unk_token]:
        raise ConfigError(f"{folder}: its first tokens are not PAD, EOS and the unknown one: give that of a byT5 model")
    letters = bytes_to_unicode()
    vocabulary = marks + [letters[byte] for byte in range(256)]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks + extra])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=marks[0], eos_token=marks[1], unk_token=marks[2],
        extra_special_tokens=extra, clean_up_tokenization_spaces=False,
    )  # fmt: skip
