"""A tokenizer's folder, copied file by file.

transformers drops settings when it saves what it has loaded.

copy_tokenizer(tokenizer, folder, out)   the files that `tokenizer` was loaded from
same_tokens(one, other, texts)           raises unless both give the same tokens
overridden(tokenizer, folder, texts)     says so where transformers does not tokenize as tokenizer.json does
keep_tokens(tokenizer, folder)           lets a copy tokenize alike beside the config.json of any model
tokenizer_settings(folder)               tokenizer_config.json, if there is one
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trunkline.engine.errors import ConfigError
from trunkline.engine.machine.files import write_json
from trunkline.engine.machine.reading import read_object, reason
from trunkline.models.text.tokenizer import load_tokenizer, tokenizer_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# config.json decides which class a tokenizer is given; templates of other names lie in a folder of their own
_PATTERNS = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "config.json", "vocab.*", "merges.txt",
    "*.model", "tokenizer.model*", "*.tiktoken", "tekken.json", "chat_template.*", "additional_chat_templates/*",
)  # fmt: skip

_OF_CLASSES = ("add_prefix_space", "legacy", "add_bos_token", "add_eos_token")
"""Settings by which a class changes what tokenizer.json says."""


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


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """The folder's tokenizer_config.json; empty if there is none. Raises ConfigError."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        return read_object(path, finite=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({reason(error)}): copy the tokenizer's folder again") from error


def keep_tokens(tokenizer: PreTrainedTokenizerFast, folder: Path) -> bool:
    """Whether the copy of `tokenizer` in `folder` tokenizes alike beside the config.json there.

    transformers may choose a tokenizer's class by the model's type. Where that changes the tokens, tokenizer.json is
    written anew, and tokenizer_config.json asks for the class that takes it as it is. Raises OSError.
    """
    if _tokenizes_alike(tokenizer, folder):
        return True
    settings = dict(tokenizer.special_tokens_map) | tokenizer_settings(folder)
    kept = {key: value for key, value in settings.items() if key not in _OF_CLASSES}
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", kept | {"tokenizer_class": "TokenizersBackend"})
    return _tokenizes_alike(tokenizer, folder)


def _tokenizes_alike(tokenizer: PreTrainedTokenizerFast, folder: Path) -> bool:
    try:
        copy = load_tokenizer(folder)
    except ConfigError:  # another class may need other files
        return False
    return copy.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
