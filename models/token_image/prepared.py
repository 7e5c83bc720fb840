"""What a configuration says of how its data set was prepared, held against the data set.

check_prepared(store, data)    the tokenizer, and whether its chat template made the texts
"""

from __future__ import annotations

from pathlib import Path

from trunkline.engine.errors import ConfigError
from trunkline.models.text.tokenizer import load_tokenizer, tokenizer_digest
from trunkline.models.token_image.config import TokenImageData
from trunkline.models.token_image.store import Store


def check_prepared(store: Store, data: TokenImageData) -> None:
    """Raises ConfigError where the store was made otherwise than `data` says."""
    found, again = f"data.store {store.root} was prepared", "prepare the texts again, or leave it out"
    if data.tokenizer is not None:
        asked = load_tokenizer(Path(data.tokenizer))
        if tokenizer_digest(asked) != tokenizer_digest(store.tokenizer()):
            raise ConfigError(f"data.tokenizer: {data.tokenizer}: {found} with another tokenizer: {again}")
    with_template = bool(store.index.get("made_from", {}).get("chat template"))
    if data.chat_template not in (None, with_template):
        how = "with" if with_template else "without"
        raise ConfigError(f"data.chat_template: {data.chat_template}: {found} {how} a chat template: {again}")
