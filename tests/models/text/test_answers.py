"""What is said of prompts that the model cannot read."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trunkline.models.text.answers import warn_of_unknown


@pytest.mark.parametrize(
    ("unknown", "texts", "said"),
    [
        ("<unk>", ["one two", "one zwei", "\t"], "warning: 2 of 3 prompts hold what the tokenizer does not know"),
        ("<unk>", ["one two"], ""),
        ("</s>", ["one zwei"], ""),  # GPT-2's, which is its end of a text too
    ],
)
def test_prompts_with_unknown_words_or_without_any_are_counted(
    unknown: str, texts: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1, "one": 2, "two": 3}, unk_token=unknown))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    warn_of_unknown(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token=unknown), texts)
    found = capsys.readouterr().err
    assert found.startswith(said) if said else not found
