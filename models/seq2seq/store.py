"""The prepared data set of an encoder-decoder: a ColumnStore (trunkline.models.text) of these arrays and files.

    {split}/inputs, {split}/input_offsets      ragged tokens: what the encoder reads
    {split}/targets, {split}/target_offsets    ragged tokens: what the decoder writes; absent for kind "text"
    tokenizer/                                 the Hugging Face tokenizer that made the tokens

Tokens are whole and without EOS, but for one between two turns of a talk (trunkline.models.seq2seq.turns). Splits are
"train", "val" and, where there is one, "test". store.json also says what it was made from and what was left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from trunkline.models.seq2seq.records import Kind
from trunkline.models.text.column_store import ColumnStore


@dataclass(frozen=True)
class SplitEntry:
    """Counts of a split: samples, tokens of inputs and of targets."""

    samples: int
    input_tokens: int
    target_tokens: int = 0


class Store(ColumnStore):
    """A whole, checked data set, of kind "pairs" or "text"."""

    workload = "seq2seq"
    prepare = "python launchers/prepare.py seq2seq --source FILES --train-tokenizer --out"
    columns = {"pairs": ("input", "target"), "text": ("input",)}  # noqa: RUF012 - a constant of the class
    entry, further = SplitEntry, frozenset({"test"})
    kind: Kind
    entries: dict[str, SplitEntry]
