"""A tokenizer's folder copied file by file, because transformers drops settings when it saves what it has loaded.

copy_tokenizer(tokenizer, folder, out)   the files that `tokenizer` was loaded from
same_tokens(one, other, texts)           raises unless both give the same tokens
overridden(tokenizer, folder, texts)     says so where transformers does not tokenize as tokenizer.json does
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import ConfigError
from models.causal_lm.tokenizer import tokenizer_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# config.json decides which class a tokenizer is given; templates of other names lie in a folder of their own
_PATTERNS = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "config.json", "vocab.*", "merges.txt",
    "*.model", "tokenizer.model*", "*.tiktoken", "tekken.json", "chat_template.*", "additional_chat_templates/*",
)  # fmt: skip


def copy_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, out: Path) -> None:
    """Write into `out` whatever of `folder` a tokenizer is loaded from, byte for byte. Raises OSError."""
    names = {name for name in type(tokenizer).vocab_files_names.values() if name == Path(name).name}
    for pattern in {*_PATTERNS, *names}:
        for path in folder.glob(pattern):
            if path.is_file():
                target = out / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


def set_chat_template(out: Path, template: str) -> None:
    """Let the tokenizer in `out` have this template and no other. Raises OSError."""
    shutil.rmtree(out / "additional_chat_templates", ignore_errors=True)
    (out / "chat_template.jinja").write_text(template, encoding="utf-8")


def same_tokens(
    tokenizer: PreTrainedTokenizerFast, copy: PreTrainedTokenizerFast, texts: Sequence[str], folder: Path
) -> None:
    """Raises ConfigError if the copy of `folder`'s tokenizer does anything else than the tokenizer itself."""
    different = [text for text in texts if tokenizer(text)["input_ids"] != copy(text)["input_ids"]]
    if different or tokenizer_digest(tokenizer) != tokenizer_digest(copy):
        shown = f", such as {different[0][:60]!r}" if different else ""
        raise ConfigError(
            f"{folder}: a copy of its tokenizer's files gives other tokens for {len(different)} of {len(texts)} texts"
            f"{shown}: save it anew with transformers, `AutoTokenizer.from_pretrained(...).save_pretrained(...)`"
        )


def overridden(tokenizer: PreTrainedTokenizerFast, folder: Path, texts: Sequence[str]) -> str | None:
    """A line that names the class by which transformers tokenizes otherwise than tokenizer.json; None if it does not.

    Texts are compared without the tokens that frame them.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    plain = Tokenizer.from_file(str(path))
    plain.no_truncation()
    plain.no_padding()
    ours = tokenizer.backend_tokenizer
    different = sum(
        plain.encode(text, add_special_tokens=False).ids != ours.encode(text, add_special_tokens=False).ids
        for text in texts
    )
    if not different:
        return None
    name = type(tokenizer).__name__
    return (
        f"tokenizer: {different} of {len(texts)} texts that were tried have other tokens by {path} alone: it is "
        f"overridden by transformers' {name}, for which tokenizer_config.json asks and whose tokens the store has"
    )
