from __future__ import annotations

import argparse
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.models.token_image.toy_run import said
from trunkline.engine.errors import ConfigError
from trunkline.launchers.evaluate import main as evaluate
from trunkline.launchers.predict import main
from trunkline.models.token_image import flags
from trunkline.models.token_image.denoiser import Denoiser
from trunkline.models.token_image.generation import Frame, frames, kept, until_end
from trunkline.models.token_image.predict import Wanted, asked, denoised, texts
from trunkline.models.token_image.trained import Trained, load_trained

CPU = torch.device("cpu")
PIXELS = 64


@pytest.fixture(scope="module")
def learnable(learnable_run: Path) -> Trained:
    return load_trained(learnable_run, CPU)


@pytest.fixture(scope="module")
def dialogue(dialogue_run: Path) -> Trained:
    return load_trained(dialogue_run, CPU)


def wanted(trained: Trained, *words: str) -> Wanted:
    parser = argparse.ArgumentParser()
    flags.predict(parser)
    return asked(trained, parser.parse_args(words))


def test_what_is_known_stays_and_what_is_unknown_is_filled(learnable: Trained) -> None:
    text = "a g__ network____ falls"
    for made in texts(learnable, wanted(learnable, "--text", text), 2, 3, "heun", 0):
        plain = bytes(made.tokens[:-1])
        assert made.tokens[-1] == learnable.eos
        assert len(plain) == len(text)
        assert all(ours == theirs for ours, theirs in zip(plain, text.encode(), strict=True) if theirs != ord("_"))


def test_another_mask_leaves_the_first_as_text(learnable: Trained) -> None:
    found = wanted(learnable, "--text", "a_b?c", "--mask", "?")
    assert found.tokens.tolist() == [97, 95, 98, -1, 99, 0]


def test_a_prompt_is_continued_up_to_the_length_or_the_end(learnable: Trained) -> None:
    for made in texts(learnable, wanted(learnable, "--prompt", "the press", "--length", "40"), 3, 2, "ancestral", 1):
        assert bytes(made.tokens[:9]) == b"the press"
        assert len(made.tokens) == 40 or made.tokens[-1] == learnable.eos
        assert learnable.eos not in made.tokens[:-1]


def test_a_text_ends_at_its_first_eos() -> None:
    """EOS is a token of the vocabulary like any other: a text that holds none has no end but the image's."""
    tokens = torch.tensor([[[5, 0], [7, 0]], [[5, 6], [7, 8]], [[0, 1], [1, 1]]])
    assert until_end(tokens, torch.tensor([4, 3, 4]), 0) == [[5, 0], [5, 6, 7], [0]]


def test_eos_can_be_sampled_and_decoded(learnable: Trained) -> None:
    encoding = learnable.network.encoding
    assert 0 <= learnable.eos < encoding.vocab_size
    assert encoding.decode(encoding.encode(torch.tensor([learnable.eos]))).tolist() == [learnable.eos]


@pytest.mark.parametrize("method", ["heun", "ancestral"])
def test_a_sample_does_not_depend_on_the_others_of_its_batch(learnable: Trained, method: str) -> None:
    options = {"count": 3, "steps": 3, "method": method, "seed": 4}
    together = [made.tokens for made in texts(learnable, wanted(learnable), batch_size=3, **options)]
    alone = [made.tokens for made in texts(learnable, wanted(learnable), batch_size=1, **options)]
    assert together == alone
    assert together[0] != together[1]


def test_steps_are_even_in_the_networks_time(learnable: Trained) -> None:
    """The times that the network is told of, Euler's: from 1000 down, each as far from the next."""
    seen = []
    handle = learnable.network.register_forward_pre_hook(lambda _, given: seen.append(float(given[1][0])))
    list(frames(learnable.network, 8, torch.tensor([PIXELS]), steps=5, method="euler"))
    handle.remove()
    assert seen == pytest.approx([1000, 800, 600, 400, 200], abs=0.1)


def test_the_last_frame_is_the_networks_guess(learnable: Trained) -> None:
    way = list(frames(learnable.network, 8, torch.tensor([PIXELS, 9]), steps=3, method="heun"))
    assert len(way) == 3
    assert torch.equal(way[-1].x, way[-1].guess)


def test_a_text_without_noise_is_read_as_it_is(dialogue: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    """By the nearest code at least: with time 0 the image is the text's own."""
    text = "compressors raise it"
    (made,) = denoised(dialogue, wanted(dialogue, "--denoise", text), 0.0, 1, 0)
    assert torch.equal(
        dialogue.network.encoding.decode(made.way[0].x).flatten()[:21], torch.tensor([*text.encode(), 0])
    )
    assert "21 by the nearest code alone" in capsys.readouterr().err


def test_a_condition_changes_what_is_made(dialogue: Trained) -> None:
    made = [
        [each.tokens for each in texts(dialogue, wanted(dialogue, *words), 2, 2, "heun", 0)]
        for words in ((), ("--condition", "a gas network"), ("--condition", "zzzz"))
    ]
    assert made[0] != made[1] != made[2]
    assert wanted(dialogue, "--condition", "ab").condition.tolist() == [97, 98, 0]  # type: ignore[union-attr]


def test_images_hold_the_tokens(dialogue_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A token of base 256 is a pixel's red, green and blue, and comes back."""
    out = tmp_path / "out"
    words = ["--run", str(dialogue_run), "--out", str(out), "--samples", "2", "--length", "50", "--steps", "2"]
    assert main([*words, "--prompt", "né"]) == 0
    names = [f"{place:03}{end}" for place in range(2) for end in (".txt", ".png", "-mask.png")]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "frames.png"])
    trained = load_trained(dialogue_run, CPU)
    for place in range(2):
        pixels, mask = (np.asarray(Image.open(out / f"{place:03}{end}")) for end in (".png", "-mask.png"))
        assert pixels.shape == (512, 512, 3)
        assert (pixels[:64, :64] == pixels[0, 0]).all()
        held = mask[::64, ::64].reshape(-1) > 0
        ids = trained.network.encoding.decode(torch.from_numpy(pixels[::64, ::64] / 255.0)).flatten()[held].tolist()
        text = (out / f"{place:03}.txt").read_bytes().decode()
        assert bytes(ids[:3]) == "né".encode()
        assert trained.tokenizer.decode(ids, skip_special_tokens=True) == text
        assert not pixels[::64, ::64].reshape(-1, 3)[~held].any()
    capsys.readouterr()
    assert main([*words[:2], "--prompt", "né", "--samples", "2", "--length", "50", "--steps", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert f"{'-' * 72}" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "no gap"], "holds no '_'"),
        (["--text", "_" * 65], "an image holds 1 to 64"),
        (["--prompt", "x" * 64], "leave no room"),
        (["--prompt", ""], "--prompt: no text in UTF-8"),
        (["--prompt", "\udcff"], "--prompt: no text in UTF-8"),
        (["--length", "65"], "an image holds 64 tokens"),
        (["--prompt", "<eos>pressure"], "--prompt: holds <eos>, which the model would take for the real one"),
        (["--text", "_<eos>"], "--text: holds <eos>"),
        (["--denoise", "a\0b"], "--denoise: holds a NUL character"),
        (["--condition", "x"], "no places for one"),
        (["--samples", "0"], "use 1 or more"),
        (["--time", "3"], "--time: has no effect"),
        (["--denoise", "x", "--time", "1001"], "use 0, clean, to 1000"),
        (["--denoise", "x", "--steps", "3"], "--steps: has no effect"),
        (["--mask", "?"], "--mask: has no effect"),
        (["--text", "a__b", "--mask", "__"], "use one character"),
    ],
)
def test_what_a_person_can_get_wrong_is_named(
    learnable_run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--run", str(learnable_run), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_condition_is_for_who_learned_from_dialogues(
    dialogue_run: Path, learnable: Trained, dialogue: Trained, tmp_path: Path
) -> None:
    """Weights that do not say it are taken as they are."""
    assert (learnable.kind, dialogue.kind) == ("texts", "dialogues")
    of_texts, silent = (load_trained(said(dialogue_run, tmp_path / f"{kind}", kind), CPU) for kind in ("texts", None))
    with pytest.raises(ConfigError, match="--condition: this network learned texts without one: leave it out"):
        wanted(of_texts, "--condition", "a")
    assert wanted(silent, "--condition", "a").condition is not None


def test_more_patches_than_a_condition_has_are_named(dialogue: Trained) -> None:
    data = dialogue.data.model_copy(update={"img_size": 32})
    large = replace(dialogue, data=data, network=Denoiser(dialogue.model, 32, dialogue.network.encoding), kind=None)
    with pytest.raises(ConfigError, match=r"32 x 8 patches \(model.patch\), and a condition has 16 x 16 at most"):
        wanted(large, "--condition", "a")
    assert wanted(large).condition is None


def test_of_the_frames_only_the_last_and_the_first_images_are_kept(learnable: Trained) -> None:
    refs = list[weakref.ref[torch.Tensor]]()

    def watched() -> Iterator[Frame]:
        for frame in frames(learnable.network, 8, torch.tensor([PIXELS, 9]), steps=4, method="heun"):
            assert sum(ref() is not None for ref in refs) <= 2  # the sampler holds the one before, too
            refs.extend(weakref.ref(each) for each in frame)
            yield frame

    last, way = kept(watched())
    every = list(frames(learnable.network, 8, torch.tensor([PIXELS, 9]), steps=4, method="heun"))
    assert torch.equal(last.x, every[-1].x)
    assert len(way) == 4
    for ours, theirs in zip(way, every, strict=True):
        assert torch.equal(ours.x, theirs.x[0])
        assert torch.equal(ours.guess, theirs.guess[0])
        assert ours.x.untyped_storage().nbytes() == ours.x.nbytes


def test_a_condition_too_long_is_named(dialogue: Trained) -> None:
    with pytest.raises(ConfigError, match="--condition: 64 tokens and EOS"):
        wanted(dialogue, "--condition", "x" * 64)


@pytest.mark.fault("a full disk under the texts that are made, and under an evaluation")
def test_where_there_is_no_room_for_results_is_said(
    learnable_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("000.txt", "000.png", "evaluation.md"):
        (tmp_path / name).symlink_to("/dev/full")
    flags = ["--run", str(learnable_run), "--steps", "2", "--out", str(tmp_path)]
    for program, more in ((main, []), (evaluate, ["--samples", "0", "--max-samples", "1"])):
        assert program([*flags, *more]) == 2
        assert f"--out {tmp_path}: cannot be written (No space left on device): make room" in capsys.readouterr().err
    (tmp_path / "000.txt").unlink()  # a picture's writer says it otherwise
    assert main(flags) == 2
    assert f"--out {tmp_path}: cannot be written" in capsys.readouterr().err


def test_weights_of_a_run_that_diverged_make_no_texts(
    learnable_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = said(learnable_run, tmp_path / "diverged", "texts")
    held = load_file(run / "model.safetensors")
    held["jit.output.bias"][0] = torch.nan
    save_file(held, run / "model.safetensors")
    assert main(["--run", str(run), "--steps", "2"]) == 2
    assert "jit.output.bias does not hold a finite number for each element: the run has div" in capsys.readouterr().err
