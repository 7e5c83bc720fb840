"""Evaluation of a trained denoiser on held-out texts, beside what counts of n-grams know.

    evaluate(run, device, ...)   -> Evaluation

The n-gram models (trunkline.models.token_image.ngrams) are of the training split. They see of a text what the network
sees, the tokens of one image: before its first there is nothing. Of dialogues the network sees the condition, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from trunkline.engine.checkpoint.trained import warn_of_other_data
from trunkline.engine.checkpoint.weights import described
from trunkline.engine.data.loading import evaluation_loader
from trunkline.engine.errors import ConfigError
from trunkline.engine.evaluation import to_device
from trunkline.engine.task import Batch
from trunkline.models.text.tokenizer import check_ids
from trunkline.models.token_image import samples
from trunkline.models.token_image.bigram import Bigram
from trunkline.models.token_image.byte_counts import count_bytes
from trunkline.models.token_image.generation import Frame, frames, kept, until_end
from trunkline.models.token_image.information import curve_of
from trunkline.models.token_image.levels import BIGRAM, NETWORK, UNIGRAM, Levels, measure
from trunkline.models.token_image.ngrams import NGrams, Tokens
from trunkline.models.token_image.task import TokenImageTask
from trunkline.models.token_image.trained import Trained, load_trained

ORDERS = 4
LARGEST_BIGRAM = 1024
"""Tokens of a vocabulary, up to which the bigram's posterior is read."""
_MOST_TOKENS = 1 << 24
"""Of the training split, from its start, that n-grams are counted of."""
_PIXELS, _LEAST_IMAGES = 24_576, 4
"""How much is read unless max_samples is given."""


@dataclass(frozen=True)
class Evaluation:
    """bits: by model, bits_per_token and bits_per_byte, and for the network the standard_error per token.

    batches: the images that were read. made: of each sample its tokens. path: of the first sample, the images on the
    way, each with the network's guess. scores: of the samples and of held-out texts of the same lengths
    """

    run: Path
    trained: Trained
    task: TokenImageTask
    split: str
    batches: list[Batch]
    bigram: Bigram | None
    levels: Levels
    bits: dict[str, dict[str, float]]
    made: list[list[int]]
    path: list[Frame]
    scores: dict[str, dict[str, float]]
    notes: list[str]


def evaluate(
    run: Path, device: torch.device, *, split: str = "val", store: Path | None = None, batch_size: int = 16,
    max_samples: int | None = None, levels: int = 16, count: int = 16, steps: int = 25, seed: int = 0,
    progress: bool = False,
) -> Evaluation:  # fmt: skip
    """Read `max_samples` evenly spaced images at `levels` levels of noise, and make up `count` texts.

    max_samples: unless given, as many as have 24,576 pixels, and 4 at least

    Raises CheckpointError, ConfigError or DataError.
    """
    trained = load_trained(run, device)
    if progress:
        print(described(trained.folder))
    data = trained.data if store is None else trained.data.model_copy(update={"store": str(store)})
    task = TokenImageTask(data, trained.model)
    network = trained.network
    if task.encoding != network.encoding:
        raise ConfigError(
            f"--store {data.store}: has {task.encoding.vocab_size:,} tokens, and the network knows "
            f"{network.encoding.vocab_size:,}: give the data set that it was trained on, or one of its tokenizer"
        )
    check_ids(task.tokenizer, trained.folder / "tokenizer", data.store)
    if store is None:
        warn_of_other_data(trained.folder, task.store.fingerprint, data.store)
    if trained.kind == "texts" and task.store.kind == "dialogues":
        raise ConfigError(
            f"--store {data.store}: holds dialogues, and the network was trained on texts, which have no condition: "
            "give texts, or prepare the data with --kind texts"
        )
    dataset = task.dataset(split)
    task.store.verify(array.name for array in [*dataset.arrays, *task.dataset("train").arrays])

    def read(number: int | None) -> list[Batch]:
        loader = evaluation_loader(
            task,
            dataset,
            num_samples=number,
            micro_batch_size=min(batch_size, number or batch_size),
            world_size=1,
            rank=0,
        )
        return [to_device(batch, device) for batch in loader]

    texts, notes = _training_texts(task)
    counted = NGrams.fit(texts, task.frequencies.double().numpy(), ORDERS)
    bigram = None
    if task.encoding.vocab_size <= LARGEST_BIGRAM:
        bigram = Bigram(task.frequencies.to(device), torch.from_numpy(counted.transitions()).float().to(device))
    else:
        notes.append(
            f"the {BIGRAM} is left out: of {task.encoding.vocab_size:,} tokens it takes too long (up to "
            f"{LARGEST_BIGRAM:,} are read)"
        )
    curve = task.curve or curve_of(task.encoding, task.frequencies)
    batches = read(max_samples or max(_LEAST_IMAGES, _PIXELS // data.img_size**2))
    found = measure(task, network, batches, levels, curve.to(device), bigram, progress)
    made, held, path = _samples(task, trained, read(count) if count else [], steps, seed, progress)
    scores = {}
    if made:
        lengths = [min(len(ours), len(theirs)) for ours, theirs in zip(made, held, strict=True)]
        pieces = {"samples": [np.array(text) for text in made], f"{split} text": held}
        scores = {name: samples.scores(samples.alike(each, lengths), texts, counted) for name, each in pieces.items()}
    bits = _bits(found, counted, _texts_of(batches), trained)
    if found.bits(NETWORK) > found.bits(UNIGRAM):
        notes.append(
            "the network's bound is above the 1-gram model's: it reads less than the frequencies of tokens say"
        )
    return Evaluation(run, trained, task, split, batches, bigram, found, bits, made, path, scores, notes)


def _training_texts(task: TokenImageTask) -> tuple[list[Tokens], list[str]]:
    """The training split's texts, each with EOS, as far as n-grams are counted; and a note if that is not all."""
    column = task.store.column("train", "text")
    ends = np.cumsum(column.lengths)
    number = max(1, int(np.searchsorted(ends, _MOST_TOKENS, side="right")))
    notes = []
    if number < len(column):
        notes.append(f"n-grams are counted of the first {number:,} of {len(column):,} training texts")
    return [np.append(column.tokens(text), task.eos) for text in range(number)], notes


def _texts_of(batches: list[Batch]) -> list[Tokens]:
    """The tokens of each image that counts."""
    return [
        tokens[:length].cpu().numpy()
        for batch in batches
        for tokens, length, valid in zip(batch["tokens"], batch["length"], batch["valid"], strict=True)
        if valid
    ]


def _samples(
    task: TokenImageTask, trained: Trained, batches: list[Batch], steps: int, seed: int, progress: bool
) -> tuple[list[list[int]], list[Tokens], list[Frame]]:
    """Texts made up, held-out ones of the same lengths (and conditions), and how the first came about."""
    made, path = list[list[int]](), list[Frame]()
    for batch in tqdm(batches, desc="make up texts", unit="batch", disable=not progress or not batches):
        last, way = kept(frames(
            trained.network, trained.data.img_size, batch["length"], steps=steps, method="heun", seed=seed,
            first=len(made), condition=task.condition(batch),
        ))  # fmt: skip
        found = until_end(task.encoding.decode(last.x), batch["length"], trained.eos)
        made += [text for text, valid in zip(found, batch["valid"], strict=True) if valid]
        path = path or way
    return made, _texts_of(batches), path


def _bits(levels: Levels, counted: NGrams, texts: list[Tokens], trained: Trained) -> dict[str, dict[str, float]]:
    per_byte = sum(map(len, texts)) / max(1, count_bytes(trained.tokenizer, texts))
    found = {NETWORK: {"bits_per_token": levels.bits(NETWORK), "standard_error": levels.deviation(NETWORK)}}
    for order, nats in enumerate(-counted.log_probabilities(texts).mean(1), 1):
        found[f"{order}-gram model"] = {"bits_per_token": float(nats) / math.log(2)}
    checks = {UNIGRAM: levels.integral()} | ({BIGRAM: levels.bits(BIGRAM)} if BIGRAM in levels.errors else {})
    for reader, bits in checks.items():
        found[f"check: {reader}, by its errors"] = {"bits_per_token": bits}
    for values in found.values():
        values["bits_per_byte"] = values["bits_per_token"] * per_byte
    return found
