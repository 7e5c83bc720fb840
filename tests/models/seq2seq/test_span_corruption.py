"""Span corruption against T5's own algorithm, written down in numpy."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from trunkline.engine.data.randomness import mix
from trunkline.models.seq2seq.config import Seq2SeqData, SpanCorruption
from trunkline.models.seq2seq.span_corruption import corrupted, counts, longest_text, noise_mask
from trunkline.models.seq2seq.texts import TextPieces
from trunkline.models.text.linear_loss import IGNORE

PAD, EOS, SENTINELS = 0, 1, list(range(999, 899, -1))
T5 = SpanCorruption(type="span_corruption")


class NoStore:
    """Where only batches are made."""

    root = "nowhere"


def pieces_of(source: int = 512, target: int = 512, objective: SpanCorruption = T5) -> TextPieces:
    data = Seq2SeqData(store="nowhere", max_source_length=source, max_target_length=target)
    return TextPieces(NoStore(), data, objective, PAD, EOS, SENTINELS)  # type: ignore[arg-type]


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor([mix(seed, number) for number in range(count)])


def masks(length: int, noise: int, spans: int, count: int, width: int | None = None) -> np.ndarray:
    of = (torch.full((count,), number) for number in (length, noise, spans))
    return noise_mask(keys(count), *of, width or length, spans).numpy()


def t5_mask(length: int, noise: int, spans: int, rng: np.random.Generator) -> np.ndarray:
    """random_spans_noise_mask of google-research's t5/data/preprocessors.py, in numpy."""

    def random_segmentation(num_items: int, num_segments: int) -> np.ndarray:
        first_in_segment = np.pad(rng.permutation(np.arange(num_items - 1) < num_segments - 1), [[1, 0]])
        return np.bincount(np.cumsum(first_in_segment))

    noise_span_lengths = random_segmentation(noise, spans)
    nonnoise_span_lengths = random_segmentation(length - noise, spans)
    interleaved = np.stack([nonnoise_span_lengths, noise_span_lengths], axis=1).reshape(-1)
    span_start_indicator = np.bincount(np.cumsum(interleaved)[:-1], minlength=length)
    return np.cumsum(span_start_indicator) % 2 == 1


def t5_sides(tokens: np.ndarray, mask: np.ndarray) -> tuple[list[int], list[int]]:
    """noise_span_to_unique_sentinel and nonnoise_span_to_unique_sentinel, token by token, and EOS."""
    sides: tuple[list[int], list[int]] = ([], [])
    for side, removed in zip(sides, (mask, ~mask)):
        number = -1
        for place, token in enumerate(tokens.tolist()):
            if not removed[place]:
                side.append(token)
            elif place == 0 or not removed[place - 1]:
                number += 1
                side.append(SENTINELS[number])
        side.append(EOS)
    return sides


def batch_of(texts: list[np.ndarray], pieces: TextPieces, draw: torch.Tensor) -> dict[str, torch.Tensor]:
    return pieces.collate(texts) | {"draw": draw, "valid": torch.ones(len(texts), dtype=torch.bool)}


def sides_of(batch: dict[str, torch.Tensor], row: int) -> tuple[list[int], list[int]]:
    inputs = batch["input_ids"][row][batch["input_document"][row] == 0]
    targets = batch["targets"][row][batch["targets"][row] != IGNORE]
    return inputs.tolist(), targets.tolist()


@pytest.mark.parametrize(
    ("inputs", "length", "targets"),
    [(128, 141, 29), (256, 284, 58), (512, 568, 114), (1024, 1137, 229), (2048, 2274, 456)],
)
def test_the_longest_text_is_t5_s(inputs: int, length: int, targets: int) -> None:
    data = Seq2SeqData(store="x", max_source_length=inputs, max_target_length=1024)
    assert longest_text(data, T5) == length
    assert (counts(length, T5).input, counts(length, T5).target) == (inputs, targets)


def test_a_short_target_shortens_the_text() -> None:
    length = longest_text(Seq2SeqData(store="x", max_source_length=512, max_target_length=29), T5)
    assert counts(length, T5).target == 29
    assert counts(length + 1, T5).target > 29


def test_the_counts_are_t5_s() -> None:
    for length in range(2, 2500):
        noise = torch.tensor(length, dtype=torch.float32).mul(0.15).round().clamp(1, length - 1)
        spans = (noise / 3.0).round().clamp(min=1)
        assert counts(length, T5) == (length, noise, spans)


@pytest.mark.parametrize(("length", "noise", "spans"), [(7, 4, 3), (9, 3, 2), (8, 4, 4), (5, 1, 1)])
def test_every_way_of_cutting_is_equally_likely(length: int, noise: int, spans: int) -> None:
    def ways(items: int) -> list[tuple[int, ...]]:
        cuts = itertools.combinations(range(1, items), spans - 1)
        return [tuple(np.diff([0, *cut, items]).tolist()) for cut in cuts]

    possible = set()
    for kept, taken in itertools.product(ways(length - noise), ways(noise)):
        possible.add(tuple(np.repeat([False, True] * spans, np.stack([kept, taken], 1).reshape(-1)).tolist()))
    draws = 400 * len(possible)
    found = Counter(map(tuple, masks(length, noise, spans, draws).tolist()))
    assert set(found) == possible
    # chi-squared with n - 1 degrees of freedom: mean n - 1, deviation sqrt(2 (n - 1))
    chi = sum((count - 400) ** 2 / 400 for count in found.values())
    assert chi < len(possible) - 1 + 5 * np.sqrt(2 * len(possible))


def test_each_place_is_noise_as_often_as_in_t5() -> None:
    of, rng, draws = counts(60, T5), np.random.default_rng(0), 4_000
    ours = masks(of.length, of.noise, of.spans, draws).mean(0)
    theirs = np.mean([t5_mask(of.length, of.noise, of.spans, rng) for _ in range(draws)], axis=0)
    assert ours[0] == theirs[0] == 0
    assert ours[-1] == theirs[-1] == 1, "noise ends a text"
    assert np.abs(ours - theirs).max() < 5 * np.sqrt(2 * 0.25 / draws)


def test_inputs_and_targets_are_t5_s_of_the_same_mask() -> None:
    rng = np.random.default_rng(1)
    texts = [rng.integers(2, 800, length) for length in (2, 3, 40, 141, 568, 300, 7)]
    draw = keys(len(texts))
    batch = corrupted(batch_of(texts, pieces_of(), draw), PAD, EOS)
    for row, text in enumerate(texts):
        of = counts(len(text), T5)
        numbers = (torch.tensor([number]) for number in of[:3])
        mask = noise_mask(draw[row : row + 1], *numbers, len(text), of.spans)[0].numpy()
        assert mask.sum() == of.noise
        assert sides_of(batch, row) == t5_sides(text, mask)
        assert (batch["input_document"][row] == 0).sum() == of.length - of.noise + of.spans + 1
        assert (batch["target_document"][row] == 0).sum() == of.noise + of.spans + 1
        shifted = batch["decoder_input_ids"][row]
        targets = batch["targets"][row]
        assert shifted[0] == PAD
        assert torch.equal(shifted[1 : of.target], targets[: of.target - 1])
        assert (shifted[of.target :] == PAD).all()
        assert (targets[of.target :] == IGNORE).all()
        assert (batch["input_ids"][row][of.input :] == PAD).all()


def test_a_text_can_be_put_together_again() -> None:
    text = np.arange(2, 302)
    batch = corrupted(batch_of([text], pieces_of(), keys(1)), PAD, EOS)
    inputs, targets = sides_of(batch, 0)
    spans: dict[int, list[int]] = {}
    for token in targets[:-1]:
        if token in SENTINELS:
            held = spans[token] = []
        else:
            held.append(token)
    whole = [part for token in inputs[:-1] for part in (spans[token] if token in SENTINELS else [token])]
    assert whole == text.tolist()
    assert list(spans) == SENTINELS[: len(spans)]


def test_a_draw_does_not_depend_on_its_batch() -> None:
    rng = np.random.default_rng(2)
    texts, draw = [rng.integers(2, 800, length) for length in (60, 400, 90)], keys(3, seed=5)
    together = corrupted(batch_of(texts, pieces_of(), draw), PAD, EOS)
    for row, text in enumerate(texts):
        alone = corrupted(batch_of([text], pieces_of(), draw[row : row + 1]), PAD, EOS)
        assert sides_of(alone, 0) == sides_of(together, row)
    other = corrupted(batch_of(texts, pieces_of(), keys(3, seed=6)), PAD, EOS)
    assert all(sides_of(other, row) != sides_of(together, row) for row in range(3))


def test_nothing_waits_for_the_device() -> None:
    """Tensors without values: whatever asks for one raises."""
    batch = batch_of([np.arange(2, 50), np.arange(2, 9)], pieces_of(), keys(2))
    shapes = {name: value.shape for name, value in corrupted(batch, PAD, EOS).items()}
    found = corrupted({name: value.to("meta") for name, value in batch.items()}, PAD, EOS)
    assert {name: value.shape for name, value in found.items()} == shapes


def test_other_shares_and_spans_are_kept_to() -> None:
    objective = SpanCorruption(type="span_corruption", noise_density=0.5, mean_span_length=8.0)
    text = np.arange(2, 102)
    batch = corrupted(batch_of([text], pieces_of(objective=objective), keys(1)), PAD, EOS)
    inputs, targets = sides_of(batch, 0)
    assert (len(inputs), len(targets)) == (100 - 50 + 6 + 1, 50 + 6 + 1)
