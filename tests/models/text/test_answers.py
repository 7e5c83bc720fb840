"""What is said of prompts that the model cannot read."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trunkline.models.text.answers import prompt_lines, warn_of_unknown


@pytest.mark.parametrize(
    ("unknown", "prompts", "said"),
    [
        (
            "<unk>",
            [["one two"], ["one zwei", "drei"], ["two", "one"], ["one", "\t"]],
            "warning: 2 of 4 prompts hold what the tokenizer does not know, and the model cannot read; the first is "
            "prompt 2\n",
        ),
        ("<unk>", [["one two"]], ""),
        ("</s>", [["one zwei"]], ""),  # GPT-2's, which is its end of a text too
    ],
)
def test_prompts_with_unknown_words_or_without_any_are_counted(
    unknown: str, prompts: list[list[str]], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1, "one": 2, "two": 3}, unk_token=unknown))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    warn_of_unknown(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token=unknown), prompts)
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("text", "said"),
    [("a\n \nb\n", "1, the first is line 2"), ("a\n\n\n", "2, the first is line 2"), ("a\nb\n", ""), ("", "")],
)
def test_blank_lines_are_counted_and_the_first_is_named(
    tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (path := tmp_path / "prompts").write_text(text)
    assert prompt_lines(path) == [line for line in ("a", "b") if line in text]
    assert capsys.readouterr().err == (said and f"note: --prompts {path}: blank lines get no answer: {said}\n")
