"""Texts that an evaluation has generated: what is summed of them, and what a person sees of them.

GeneratedTexts(tokenizer, data, metrics)    .sums(texts), .show(sums, folder)
marked(expected, made)                      both, with what differs between ⟦ and ⟧
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trunkline.engine.record.tables import markdown
from trunkline.engine.task import Sums
from trunkline.models.seq2seq.config import Seq2SeqData
from trunkline.models.seq2seq.text_metrics import TextMetrics
from trunkline.models.text.tokenizer import special_ids

SHOWN = 20


class Generated(NamedTuple):
    """Of one sample: its number among those that texts are generated for, and its tokens without EOS at their end."""

    number: int
    prompt: list[int]
    expected: list[int]
    made: list[int]


class GeneratedTexts:
    """max_new_tokens: the most that are generated."""

    def __init__(self, tokenizer: Any, data: Seq2SeqData, max_new_tokens: int, metrics: TextMetrics) -> None:
        self._tokenizer, self._metrics = tokenizer, metrics
        self._marks = set(special_ids(tokenizer)) - {tokenizer.unk_token_id}  # what is unknown stands for some text
        self._widths = {"prompt": data.max_source_length, "expected": data.max_target_length, "made": max_new_tokens}

    def sums(self, texts: Sequence[Generated]) -> Sums:
        """The statistics of TextMetrics; and the first SHOWN samples' tokens, each + 1 in its own place, else 0."""
        shown: dict[str, Tensor] = {
            f"shown_{side}": torch.zeros(SHOWN, width, dtype=torch.int64) for side, width in self._widths.items()
        }
        for text in texts:
            if text.number < SHOWN:
                for side in self._widths:
                    tokens = torch.tensor(getattr(text, side), dtype=torch.int64)
                    shown[f"shown_{side}"][text.number, : len(tokens)] = tokens + 1
        made, expected = ([self.decoded(getattr(text, side)) for text in texts] for side in ("made", "expected"))
        return self._metrics.statistics(made, expected) | shown

    def is_exact(self, text: Generated) -> bool:
        """Whether it is the text that was expected."""
        return self.decoded(text.made) == self.decoded(text.expected)

    def decoded(self, tokens: Sequence[int], marks: bool = False) -> str:
        """The text of tokens; with `marks` also what stands for no text, such as EOS between two turns."""
        kept = tokens if marks else [token for token in tokens if token not in self._marks]
        text: str = self._tokenizer.decode(kept)
        return text

    def show(self, sums: Sums, folder: Path) -> None:
        """Write generated.md: the scores with their signatures, and some texts beside what was expected."""
        scores = self._metrics.scores(sums)
        if not scores["generated"]:
            return
        shown = [sums[f"shown_{side}"].long().tolist() for side in self._widths]  # sums over ranks are fp64
        lines = [
            f"{int(sums['exact']):,} of {int(scores['generated']):,} generated texts are what was expected. What "
            "differs stands between ⟦ and ⟧.",
            "",
            *(f"- {name} {scores[name]:.2f} ({how})" for name, how in self._metrics.signatures.items()),
            "",
        ]
        rows = [["", "prompt", "expected", "generated"]]
        for prompt, *sides in zip(*shown, strict=True):
            if any(prompt):
                expected, made = (self.decoded([token - 1 for token in side if token]) for side in sides)
                said = self.decoded([token - 1 for token in prompt if token], marks=True)
                rows.append(["=" if expected == made else "", *map(_on_one_line, (said, *marked(expected, made)))])
        (folder / "generated.md").write_text("\n".join([*lines, markdown(rows)]) + "\n", encoding="utf-8")


def marked(expected: str, made: str) -> tuple[str, str]:
    """Both, what is between their common beginning and end in brackets: ("1 ⟦2⟧ 3", "1 ⟦4⟧ 3")."""
    if expected == made:
        return expected, made
    first = _common(expected, made)
    last = _common(expected[first:][::-1], made[first:][::-1])
    a, b = (f"{text[:first]}⟦{text[first : len(text) - last]}⟧{text[len(text) - last :]}" for text in (expected, made))
    return a, b


def _common(a: str, b: str) -> int:
    """Characters that both begin with."""
    return next((place for place, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def _on_one_line(text: str) -> str:
    return "⏎".join(text.splitlines()) or "(nothing)"
