"""Texts that an evaluation generates: against transformers one by one, on several ranks, and as a page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sacrebleu.metrics import BLEU, CHRF

from tests.distributed import run_distributed_test
from tests.models.seq2seq.by_transformers import ByTransformers
from tests.models.seq2seq.toy_pairs import toy_config
from trunkline.engine.ranks.distributed import start
from trunkline.engine.task import Batch, Sums
from trunkline.engine.trainer import Trainer
from trunkline.models.registry import make_task
from trunkline.models.seq2seq.config import Seq2SeqData
from trunkline.models.seq2seq.generated import Generated, GeneratedTexts, marked
from trunkline.models.seq2seq.text_metrics import TextMetrics

LAYOUTS = [("fsdp", 3, 7)]
OTHERS = [
    ("deepspeed", 3, 7),
    ("deepspeed", 3, 0),
    ("fsdp", 3, 256),
    ("deepspeed", 0, 7),
    ("deepspeed", 2, 256),
    ("fsdp", 2, 7),
    ("fsdp", 3, 0),
]


def last_validation(run: Path) -> dict[str, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == "val"][-1]


def page(run: Path) -> str:
    path = run / "shown" / "generated.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def task_of(folder: Path, store: Path, model: Path, **generation: Any) -> Any:
    return make_task(toy_config(folder, store, model={"path": str(model), "generation": generation}))


def batch_of(task: Any, places: list[int], fillers: int = 0) -> Batch:
    dataset = task.dataset("val")
    batch: Batch = task.collate([dataset[place] for place in [*places, *[0] * fillers]])
    return batch | {"valid": torch.arange(len(places) + fillers) < len(places)}


def sums_of(task: Any, places: list[int], fillers: int = 0) -> Sums:
    with torch.no_grad():
        sums: Sums = task.evaluate(task.build_model().eval(), batch_of(task, places, fillers))
    return sums


def test_metrics_are_those_of_transformers_own_texts_made_one_by_one(pairs: Path, trained_run: Path) -> None:
    task: Any = make_task(toy_config(trained_run.parent / "again", pairs))
    alone = ByTransformers(trained_run / "final")
    made, expected, right, tokens = [], [], 0, 0
    for prompt, target, _ in (task.dataset("val")[place] for place in range(len(task.dataset("val")))):
        made.append(alone.answer(alone.tokenizer.decode(prompt[:-1]), max_new_tokens=32))
        expected.append(alone.tokenizer.decode(target[:-1]))
        right += (np.array(alone.likeliest(prompt.tolist(), target.tolist())) == target).sum()
        tokens += len(target)
    assert len({*made}) > 5
    found = last_validation(trained_run)
    assert found["generated"] == len(made)
    assert found["exact_match"] == np.mean([a == b for a, b in zip(made, expected, strict=True)])
    assert found["bleu"] == BLEU().corpus_score(made, [expected]).score
    assert found["chrf"] == CHRF().corpus_score(made, [expected]).score
    assert found["token_accuracy"] == right / tokens
    for text, wanted in zip(made, expected, strict=True):
        for side in marked(wanted, text):
            assert f"| {side} |" in page(trained_run)
    assert str(BLEU().corpus_score(made, [expected]).score)[:4] in page(trained_run)
    assert "tok:13a" in page(trained_run)


def test_a_fixed_evenly_spaced_set_is_generated_for_and_fillers_are_not(
    pairs: Path, trained_run: Path, tmp_path: Path
) -> None:
    task = task_of(tmp_path, pairs, trained_run / "best", samples=4)
    dataset = task.dataset("val")
    numbers = [dataset[place].number for place in range(len(dataset))]
    assert [numbers[4 * len(dataset) // 4 - 1], numbers.count(-1)] == [-1, len(dataset) - 4]
    assert [numbers.index(number) for number in range(4)] == [number * len(dataset) // 4 for number in range(4)]
    few, filled = sums_of(task, [0, 1, 2]), sums_of(task, [0, 1, 2], fillers=3)
    assert int(few["generated"]) == sum(number >= 0 for number in numbers[:3]) == 1
    for name, value in few.items():
        torch.testing.assert_close(filled[name], value, rtol=1e-6, atol=0)
    none = sums_of(task, [1])
    assert task.summarize(none).keys() == {"loss", "perplexity", "token_accuracy", "generated"}
    assert {name: value.shape for name, value in none.items()} == {name: value.shape for name, value in few.items()}


def test_a_folder_that_asks_for_samples_is_validated_greedily_and_its_stops_count(
    pairs: Path, trained_run: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(trained_run / "best", tmp_path / "other"))
    (other / "digests.json").unlink()  # its files are changed
    asked = {"do_sample": True, "temperature": 5.0, "num_beams": 3, "no_repeat_ngram_size": 1, "max_length": 3}
    (other / "generation_config.json").write_text(json.dumps(asked))
    places = list(range(10))
    plain = task_of(tmp_path / "plain", pairs, trained_run / "best")
    sums = sums_of(plain, places)
    again = sums_of(task_of(tmp_path / "asked", pairs, other), places)
    assert all(torch.equal(again[name], value) for name, value in sums.items())
    stop = int(sums["shown_made"][0, 1]) - 1
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, stop]}))
    stopped = sums_of(task_of(tmp_path / "stopped", pairs, other), places)["shown_made"]
    assert not (stopped == stop + 1).any()
    assert stopped[0, 0] == sums["shown_made"][0, 0]


def test_what_the_tokenizer_does_not_know_counts_as_text() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )  # fmt: skip
    data = Seq2SeqData(store="x", max_source_length=8, max_target_length=8)
    texts = GeneratedTexts(tokenizer, data, 8, TextMetrics("13a"))
    assert not texts.is_exact(Generated(0, [3], [3, 2], [3]))
    assert not texts.is_exact(Generated(0, [3], [2, 2], [2]))
    assert texts.is_exact(Generated(0, [3], [3, 2], [3, 2]))


@pytest.mark.parametrize(
    ("expected", "made", "shown"),
    [
        ("1 2 3", "1 4 3", ("1 ⟦2⟧ 3", "1 ⟦4⟧ 3")),
        ("1 1", "1 1 1", ("1 1⟦⟧", "1 1⟦ 1⟧")),
        ("", "a", ("⟦⟧", "⟦a⟧")),
        ("ab", "ab", ("ab", "ab")),
        ("你好", "你们好", ("你⟦⟧好", "你⟦们⟧好")),
    ],
)
def test_what_differs_is_marked(expected: str, made: str, shown: tuple[str, str]) -> None:
    assert marked(expected, made) == shown


def evaluate_run(folder: Path, store: Path, model: Path, layout: tuple[str, int, int]) -> None:
    backend, stage, samples = layout
    config = toy_config(
        folder / f"of {start().rank}", store, model={"path": str(model), "generation": {"samples": samples}},
        training={"steps": 1, "eval_every": 1},
        deepspeed={
            "train_batch_size": 12, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage},
            "optimizer": {"params": {"lr": 1e-12, "weight_decay": 0.0}}, "scheduler": {"params": {"warmup": 1}},
        },
    )  # fmt: skip
    Trainer(make_task(config), config, start(), folder, backend=backend).run()


def evaluate_everywhere(rank: int, world_size: int, folder: Path, store: Path, model: Path, layouts: list[Any]) -> None:
    for layout in layouts:
        evaluate_run(folder / str(layout), store, model, layout)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [
        (2, LAYOUTS),
        pytest.param(3, LAYOUTS, marks=pytest.mark.slow),
        pytest.param(2, OTHERS, marks=pytest.mark.slow),
        pytest.param(3, OTHERS, marks=pytest.mark.slow),
    ],
)
def test_ranks_that_decode_different_lengths_give_one_process_s_scores_and_texts(
    tmp_path: Path, pairs: Path, trained_run: Path, ranks: int, layouts: list[tuple[str, int, int]]
) -> None:
    model = trained_run / "best"
    for samples in {samples for *_, samples in layouts}:
        evaluate_run(tmp_path / f"alone {samples}", pairs, model, ("deepspeed", 0, samples))
    run_distributed_test(evaluate_everywhere, ranks, tmp_path, pairs, model, layouts, backend=None)
    for layout in layouts:
        alone, run = tmp_path / f"alone {layout[2]}", tmp_path / str(layout)
        expected, found = last_validation(alone), last_validation(run)
        assert found.keys() == expected.keys()
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        for name in found.keys() - {"loss", "perplexity", "step", "time", "seconds"}:
            assert found[name] == expected[name], (layout, name)
        assert page(run) == page(alone)
        assert ("bleu" in found) == (layout[2] > 0)
