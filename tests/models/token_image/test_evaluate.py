from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models.token_image.conftest import make_store
from trunkline.engine.checkpoint.weights import saved_facts
from trunkline.launchers.evaluate import main
from trunkline.models.token_image import evaluate as module
from trunkline.models.token_image.evaluate import Evaluation, evaluate
from trunkline.models.token_image.generation import frames
from trunkline.models.token_image.levels import BIGRAM, NETWORK, UNIGRAM
from trunkline.models.token_image.ngrams import NGrams

CPU = torch.device("cpu")
PICTURES = ["accuracy.png", "errors.png", "page.png", "strip.png", "frames.png"]
FEW = ["--max-samples", "6", "--levels", "4", "--samples", "3", "--steps", "2"]


def test_everything_is_written(learnable_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", str(learnable_run), "--out", str(tmp_path / "out"), *FEW]) == 0
    out, printed = tmp_path / "out", capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*PICTURES, "evaluation.md", "evaluation.json", "samples.txt"]
    )
    for name in PICTURES:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert f"![]({name})" in (out / "evaluation.md").read_text()
    found = json.loads((out / "evaluation.json").read_text())
    assert found["images"] == 6
    assert found["levels"]["share"] == pytest.approx([0.125, 0.375, 0.625, 0.875])
    assert set(found["levels"]["accuracy"]) == {NETWORK, "nearest code", UNIGRAM, BIGRAM}
    assert set(found["samples"]) == {"samples", "val text"}
    assert f"| {NETWORK} |" in printed
    assert "| 4-gram model |" in printed


@pytest.fixture(scope="module")
def learnable(learnable_run: Path) -> Evaluation:
    return evaluate(learnable_run, CPU, levels=2, count=5, steps=2)


def test_the_counts_are_of_the_training_texts_and_see_what_the_network_sees(learnable: Evaluation) -> None:
    """The split val holds the training texts here, cut into images of 64."""
    found = learnable
    task = found.task
    column = task.store.column("train", "text")
    texts = [np.append(column.tokens(place), 0) for place in range(len(column))]
    images = [text[at : at + 64] for text in texts for at in range(0, max(len(text), 1), 64)]
    assert sum(map(len, images)) == found.levels.lengths.sum()
    model = NGrams.fit(texts, task.frequencies.double().numpy(), 4)
    for order in range(1, 5):
        wanted = -model.log_probabilities(images)[order - 1].mean() / math.log(2)
        assert found.bits[f"{order}-gram model"]["bits_per_token"] == pytest.approx(wanted)
    per_byte = found.levels.lengths.sum() / (found.levels.lengths.sum() - len(texts))  # an EOS has no byte
    assert found.bits["1-gram model"]["bits_per_byte"] == pytest.approx(
        found.bits["1-gram model"]["bits_per_token"] * per_byte
    )
    assert found.levels.bits(UNIGRAM) == pytest.approx(found.bits["1-gram model"]["bits_per_token"], abs=1e-4)


def test_samples_are_compared_with_texts_of_the_same_lengths_alone(learnable: Evaluation) -> None:
    """What a network makes up is about nothing: no text is expected of it."""
    found = learnable
    ours, theirs = found.scores["samples"], found.scores["val text"]
    assert ours["tokens"] == theirs["tokens"] == sum(map(len, found.made))
    assert theirs["copied 24-grams"] == 1
    assert set(ours) == set(theirs)


def test_conditions_go_with_their_samples(dialogue_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(*args, **options):  # type: ignore[no-untyped-def]
        seen.append(options["condition"])
        return frames(*args, **options)

    monkeypatch.setattr(module, "frames", watched)
    monkeypatch.setattr(module, "LARGEST_BIGRAM", 255)
    found = evaluate(dialogue_run, CPU, levels=2, max_samples=2, count=2, steps=1)
    ((image, held),) = seen
    condition = found.task.store.column("val", "condition")
    assert len(condition.tokens(0)) == 0  # nothing stands before the first
    assert held.flatten(1).sum(1).tolist() == [0, min(len(condition.tokens(3)), 63) + 1]
    ids = found.task.encoding.decode(image).flatten(1)
    assert ids[1, : int(held[1].sum()) - 1].tolist() == condition.tokens(3)[:63].tolist()
    assert BIGRAM not in found.levels.right
    assert "bigram posterior is left out: of 256 tokens" in found.notes[0]


def test_the_best_weights_are_those_of_the_best_validation(learnable_run: Path) -> None:
    lines = [json.loads(line) for line in (learnable_run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if line["split"] == "val"}
    facts = saved_facts(learnable_run / "best")
    assert len(losses) == 2
    assert facts["step"] == min(losses, key=lambda step: losses[step])
    assert facts["loss"] == pytest.approx(min(losses.values()))
    assert all({"token_accuracy", "bits_per_token"} <= set(line) for line in lines if line["split"] == "val")


@pytest.mark.parametrize("flags", [["--levels", "1"], ["--samples", "-1"], ["--max-samples", "0"], ["--steps", "0"]])
def test_values_out_of_range_are_named(learnable_run: Path, flags: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(["--run", str(learnable_run), *flags]) == 2
    assert f"{flags[0]} {flags[1]}: use" in capsys.readouterr().err


def test_a_split_that_is_not_there_and_a_store_that_does_not_fit_are_named(
    learnable_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["--run", str(learnable_run), "--split", "test"]) == 2
    assert "no split 'test'" in capsys.readouterr().err
    store = make_store(tmp_path, vocab_size=300).root
    assert main(["--run", str(learnable_run), "--store", str(store)]) == 2
    assert "has 300 tokens, and the network knows 256" in capsys.readouterr().err
    shutil.rmtree(store)
