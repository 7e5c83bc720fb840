"""How generated texts compare with what was expected: exact match, corpus BLEU-4 and chrF, from sums.

sacrebleu gives integers for each text. Their sums over batches and ranks give its score of the whole corpus, exactly; a
mean of the scores of batches would be another number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sacrebleu.metrics import BLEU, CHRF

from trunkline.engine.task import Sums

NAMES = ("exact_match", "bleu", "chrf")
"""Of all of them more is better. exact_match is a share, the others go from 0 to 100."""


class TextMetrics:
    """bleu_tokenizer: sacrebleu's; "zh" for Chinese, of which "13a" sees a whole sentence as one word."""

    def __init__(self, bleu_tokenizer: str) -> None:
        # force says that texts which look tokenized are meant: it silences a warning, and changes no score
        self._metrics = {"bleu": BLEU(tokenize=bleu_tokenizer, force=True), "chrf": CHRF()}
        for metric in self._metrics.values():
            metric.num_refs = 1  # otherwise known only once it has seen a text, and a rank may see none

    def statistics(self, made: Sequence[str], expected: Sequence[str]) -> Sums:
        """int64 "generated", "exact", "bleu" [10] and "chrf" [18]: of these texts, which may be none."""
        sums = {
            "generated": torch.tensor(len(made)),
            "exact": torch.tensor(sum(a == b for a, b in zip(made, expected, strict=True))),
        }
        for (name, metric), width in zip(self._metrics.items(), (10, 18), strict=True):
            rows = metric._extract_corpus_statistics(made, [expected]) if made else []
            sums[name] = torch.tensor(rows, dtype=torch.int64).view(-1, width).sum(dim=0)
        return sums

    def scores(self, sums: Sums) -> dict[str, float]:
        """ "generated", the number of texts, and where there is any text NAMES."""
        sums = {name: sums[name].long() for name in ("generated", "exact", *self._metrics)}  # fp64 where over ranks
        count = int(sums["generated"])
        if not count:
            return {"generated": 0.0}
        found = {name: metric._aggregate_and_compute([sums[name].tolist()]) for name, metric in self._metrics.items()}
        scores = {name: float(score.score) for name, score in found.items()}
        return {"generated": float(count), "exact_match": int(sums["exact"]) / count} | scores

    @property
    def signatures(self) -> dict[str, str]:
        """By name, how sacrebleu computes it: what to quote beside a score."""
        return {name: str(metric.get_signature()) for name, metric in self._metrics.items()}
