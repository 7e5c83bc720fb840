"""Scores from sums against sacrebleu's of the whole corpus."""

from __future__ import annotations

import random

import pytest
from sacrebleu.metrics import BLEU, CHRF

from trunkline.engine.task import add_sums
from trunkline.models.seq2seq.text_metrics import TextMetrics

TOKENIZERS = ("13a", "zh", "char", "intl", "none")


def corpus(seed: int, count: int = 60) -> tuple[list[str], list[str]]:
    """Texts as they may be made, some empty or whole, and what was expected."""
    draw = random.Random(seed)
    words = ["the", "cat", "sat,", "on", "a", "mat.", "你好", "世界", "3.14", "“so”", "I'm", "x\ny"]
    expected = [" ".join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(count)]
    made = [" ".join(word for word in text.split(" ") if draw.random() < 0.8) for text in expected]
    return [draw.choice([text, text, "", other]) for text, other in zip(made, expected, strict=True)], expected


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_sums_over_ragged_batches_give_the_score_of_the_whole_corpus(tokenizer: str) -> None:
    made, expected = corpus(3)
    metrics, sums, scores = TextMetrics(tokenizer), None, {}
    for first, stop in ((0, 7), (7, 7), (7, 50), (50, 60)):
        part = metrics.statistics(made[first:stop], expected[first:stop])
        sums, scores = add_sums(sums, part), metrics.scores(part)
    assert sums is not None
    found = metrics.scores(sums)
    bleu, chrf = BLEU(tokenize=tokenizer), CHRF()
    assert found == {
        "generated": 60,
        "exact_match": sum(a == b for a, b in zip(made, expected, strict=True)) / 60,
        "bleu": bleu.corpus_score(made, [expected]).score,
        "chrf": chrf.corpus_score(made, [expected]).score,
    }
    assert 1 < found["bleu"] < 99
    assert found["bleu"] != scores["bleu"], "the last batch is not the corpus"
    assert metrics.signatures == {"bleu": str(bleu.get_signature()), "chrf": str(chrf.get_signature())}


def test_chinese_needs_its_own_tokenizer() -> None:
    expected = ["今天的天气非常好我们去公园吧", "他在学校里学习中文已经三年了"]
    made = ["今天的天气非常好我们去商店吧", "他在学校里学习英文已经三年了"]
    bleu = {name: (metrics := TextMetrics(name)).scores(metrics.statistics(made, expected))["bleu"]
            for name in ("13a", "zh")}  # fmt: skip
    assert bleu["13a"] == 0
    assert bleu["zh"] == BLEU(tokenize="zh").corpus_score(made, [expected]).score > 40


def test_without_a_text_there_is_no_score() -> None:
    metrics = TextMetrics("13a")
    assert metrics.scores(metrics.statistics([], [])) == {"generated": 0}
    assert "tok:13a" in metrics.signatures["bleu"]
