"""The prepared data set: a ColumnStore (trunkline.models.text) of these arrays and files.

    {split}/texts, {split}/text_offsets              ragged tokens, without EOS
    {split}/conditions, {split}/condition_offsets    of kind "dialogues": what a text answers; may be empty
    tokenizer/                                       the Hugging Face tokenizer that made the tokens

Splits are "train", "val" and, where there is one, "test".
"""

from __future__ import annotations

from dataclasses import dataclass

from trunkline.models.text.column_store import ColumnStore
from trunkline.models.token_image.records import Kind

KIND_KEY = "store_kind"
"""Of config.json beside weights: the kind of the data that they were trained on."""


@dataclass(frozen=True)
class SplitEntry:
    """Counts of a split: samples, tokens of texts and of conditions."""

    samples: int
    text_tokens: int
    condition_tokens: int = 0


class Store(ColumnStore):
    """A whole, checked data set."""

    workload = "token_image"
    prepare = "python launchers/prepare.py token_image --source FILES --train-tokenizer --out"
    columns = {"texts": ("text",), "dialogues": ("text", "condition")}  # noqa: RUF012 - a constant of the class
    entry, further = SplitEntry, frozenset({"test"})
    kind: Kind
    entries: dict[str, SplitEntry]
