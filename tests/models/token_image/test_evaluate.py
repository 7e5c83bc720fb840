from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.token_image.conftest import TEXTS, make_store, write_store
from tests.models.token_image.toy_run import SMALL, said, train
from trunkline.engine.checkpoint.weights import saved_facts
from trunkline.launchers.evaluate import main
from trunkline.models.token_image import evaluation
from trunkline.models.token_image.evaluation import evaluate
from trunkline.models.token_image.generation import frames
from trunkline.models.token_image.levels import BIGRAM, NETWORK, UNIGRAM
from trunkline.models.token_image.ngrams import NGrams
from trunkline.models.token_image.store import Store

CPU = torch.device("cpu")
PICTURES = ["accuracy.png", "errors.png", "page.png", "strip.png", "learning.png", "frames.png"]


@pytest.fixture(scope="module")
def out(learnable_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is written of all images, at few levels of noise."""
    folder = tmp_path_factory.mktemp("evaluation")
    words = ["--run", str(learnable_run), "--out", str(folder)]
    assert main([*words, "--levels", "4", "--samples", "5", "--steps", "2"]) == 0
    return folder


@pytest.fixture(scope="module")
def found(out: Path) -> dict[str, Any]:
    return json.loads((out / "evaluation.json").read_text())


def test_everything_is_written(out: Path, found: dict[str, Any]) -> None:
    texts = ["evaluation.md", "evaluation.json", "samples.txt"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*PICTURES, *texts])
    page = (out / "evaluation.md").read_text()
    for name in PICTURES:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
        assert f"![]({name})" in page
    assert all(f"| {name} |" in page for name in (NETWORK, "4-gram model", "samples"))
    assert found["levels"]["share"] == pytest.approx([0.125, 0.375, 0.625, 0.875])
    assert set(found["levels"]["accuracy"]) == {NETWORK, "nearest code", UNIGRAM, BIGRAM}
    assert not found["notes"]


def test_the_counts_are_of_the_training_texts_and_see_what_the_network_sees(texts: Path, found: dict[str, Any]) -> None:
    """The split val holds the training texts here, cut into images of 64."""
    column = Store.open(texts).column("train", "text")
    whole = [np.append(column.tokens(place), 0) for place in range(len(column))]
    images = [text[at : at + 64] for text in whole for at in range(0, len(text), 64)]
    tokens = sum(map(len, images))
    assert (found["images"], found["tokens"]) == (len(images), tokens)
    counts = np.bincount(np.concatenate(whole), minlength=256) + 1
    model = NGrams.fit(whole, counts / counts.sum(), 4)
    for order in range(1, 5):
        bits, wanted = found["bits"][f"{order}-gram model"], -model.log_probabilities(images)[order - 1].mean()
        assert bits["bits_per_token"] == pytest.approx(wanted / math.log(2), rel=1e-6)
        per_byte = tokens / (tokens - len(whole))  # an EOS has no byte
        assert bits["bits_per_byte"] == pytest.approx(bits["bits_per_token"] * per_byte)


def test_samples_are_compared_with_texts_of_the_same_lengths_alone(found: dict[str, Any]) -> None:
    """What a network makes up is about nothing: no text is expected of it."""
    assert set(found["samples"]) == {"samples", "val text"}
    ours, theirs = found["samples"]["samples"], found["samples"]["val text"]
    assert ours["tokens"] == theirs["tokens"] > 5
    assert theirs["copied 24-grams"] == 1
    assert set(ours) == set(theirs)


def test_conditions_go_with_their_samples(dialogue_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(*args, **options):  # type: ignore[no-untyped-def]
        seen.append(options["condition"])
        return frames(*args, **options)

    monkeypatch.setattr(evaluation, "frames", watched)
    monkeypatch.setattr(evaluation, "LARGEST_BIGRAM", 255)
    found = evaluate(dialogue_run, CPU, levels=2, max_samples=2, count=2, steps=1)
    ((image, held),) = seen
    condition = found.task.store.column("val", "condition")
    assert len(condition.tokens(0)) == 0  # nothing stands before the first
    assert held.flatten(1).sum(1).tolist() == [0, min(len(condition.tokens(3)), 63) + 1]
    ids = found.task.encoding.decode(image).flatten(1)
    assert ids[1, : int(held[1].sum()) - 1].tolist() == condition.tokens(3)[:63].tolist()
    assert BIGRAM not in found.levels.right
    assert "bigram posterior is left out: of 256 tokens" in found.notes[0]
    assert "it reads less than the frequencies of tokens say" in found.notes[-1], "after a few steps of the recipe"


@pytest.mark.parametrize(("pixels", "images"), [(5 * 64 + 1, 5), (64, 4)])
def test_as_many_images_are_read_as_have_some_pixels(
    learnable_run: Path, monkeypatch: pytest.MonkeyPatch, pixels: int, images: int
) -> None:
    monkeypatch.setattr(evaluation, "_PIXELS", pixels)
    monkeypatch.setattr(evaluation, "LARGEST_BIGRAM", 255)
    assert len(evaluate(learnable_run, CPU, levels=2, count=0).levels.lengths) == images


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
    learnable_run: Path, dialogue_run: Path, dialogues: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["--run", str(learnable_run), "--split", "test"]) == 2
    assert "no split 'test'" in capsys.readouterr().err
    store = make_store(tmp_path, vocab_size=300).root
    assert main(["--run", str(learnable_run), "--store", str(store)]) == 2
    assert "has 300 tokens, and the network knows 256" in capsys.readouterr().err
    of_texts = said(dialogue_run, tmp_path / "of-texts", "texts")
    assert main(["--run", str(of_texts), "--store", str(dialogues)]) == 2
    assert "holds dialogues, and the network was trained on texts" in capsys.readouterr().err
    shutil.rmtree(store)


def test_a_store_of_another_tokenizer_is_named(
    learnable_run: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """It has as many tokens, two of which have changed places."""
    run = said(learnable_run, tmp_path / "swapped", "texts")
    path = run / "tokenizer/tokenizer.json"
    raw = json.loads(path.read_text())
    vocabulary = raw["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(raw))
    assert main(["--run", str(run), "--store", str(texts)]) == 2
    assert "its token 97 is 'a', but 'b' to the model" in capsys.readouterr().err


def test_a_data_set_that_was_prepared_anew_since_training_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(tmp_path).root
    run = train(tmp_path, store, SMALL)
    evaluate(run, CPU, levels=2, max_samples=1, count=0)
    assert "has changed" not in capsys.readouterr().out
    shutil.rmtree(store)
    shutil.rmtree(tmp_path / "draft", ignore_errors=True)
    write_store(tmp_path, "texts", [(text.encode(), b"") for text in TEXTS[:3]])
    evaluate(run, CPU, levels=2, max_samples=1, count=0)
    assert f"warning: {store} has changed since {run / 'best'} was trained" in capsys.readouterr().out
    evaluate(run, CPU, store=store, levels=2, max_samples=1, count=0)
    assert "has changed" not in capsys.readouterr().out
