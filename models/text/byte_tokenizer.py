"""Tokenizers whose tokens are bytes.

    plain_bytes()        256 tokens: a byte's token is its value; EOS has the place of NUL, which no text holds
    fast_bytes(slow)     byT5's, which transformers has in Python alone, as a fast one: the same tokens; bytes that are
                         no text become U+FFFD, which `slow` leaves out

Of byT5, PAD, EOS and the unknown token come first, then each byte, then <extra_id_0>, ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


def plain_bytes() -> PreTrainedTokenizerFast:
    """See the top of this file."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters, eos = bytes_to_unicode(), "<eos>"
    tokenizer = _of_bytes({eos: 0} | {letters[byte]: byte for byte in range(1, 256)}, [eos])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, clean_up_tokenization_spaces=False)


def fast_bytes(slow: Any) -> PreTrainedTokenizerFast:
    """The same as `slow`, a ByT5Tokenizer. Raises ValueError for one whose marks are not where byT5 has them."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    known = {number: token for token, number in slow.get_vocab().items()}
    marks = [known[number] for number in range(3)]
    if marks != [slow.pad_token, slow.eos_token, slow.unk_token]:
        raise ValueError(f"its first tokens are {marks}, where byT5 has PAD, EOS and the unknown token")
    extra = [known[number] for number in range(3 + 256, len(known))]
    letters = bytes_to_unicode()
    vocabulary = marks + [letters[byte] for byte in range(256)]
    tokenizer = _of_bytes({token: number for number, token in enumerate(vocabulary)}, marks + extra)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=marks[0], eos_token=marks[1], unk_token=marks[2],
        extra_special_tokens=extra, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _of_bytes(vocabulary: dict[str, int], marks: list[str]) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return tokenizer
