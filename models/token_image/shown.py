"""What a person sees of an evaluation: curves, a page, a text at several levels of noise, a sample on its way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trunkline.engine.data.randomness import normal
from trunkline.engine.record.metrics_file import MetricsFile, read_metrics
from trunkline.engine.task import Batch
from trunkline.models.token_image.encodings import Encoding
from trunkline.models.token_image.evaluation import Evaluation
from trunkline.models.token_image.generation import Frame
from trunkline.models.token_image.levels import NETWORK, UNIGRAM, read
from trunkline.models.token_image.plots import (
    Row,
    colors,
    plot_accuracy,
    plot_errors,
    plot_learning,
    plot_page,
    plot_rows,
)

_ROWS = 5
_PAGE = 0.6  # of tokens that frequencies read right, about


def show(result: Evaluation, out: Path) -> list[Path]:
    """Draw accuracy, errors, page and strip, and learning and frames where they are known. Returns the paths, .png."""
    names = ["accuracy.png", "errors.png", "page.png", "strip.png"]
    plot_accuracy(result.levels, out / names[0])
    plot_errors(result.levels, out / names[1])
    if found := _learning(result.run):
        names.append("learning.png")
        lines = {name: values["bits_per_token"] for name, values in result.bits.items() if name.endswith("gram model")}
        plot_learning(found, lines, out / names[-1], result.split)
    batch = _one(result)
    _page(result, batch, out / names[2])
    _strip(result, batch, out / names[3])
    if result.path:
        names.append("frames.png")
        plot_way(result.path, len(result.made[0]), result.trained.names(), result.task.encoding, out / names[-1])
    return [out / name for name in names]


def _learning(run: Path) -> list[tuple[int, float]]:
    """Steps of a run's validations with their bits a token, where they were measured; nothing beside bare weights."""
    if not (path := run / MetricsFile.name).is_file():
        return []
    rows = [row for row in read_metrics(path) if row["split"] == "val" and "bits_per_token" in row]
    return [(row["step"], row["bits_per_token"]) for row in rows]


def _one(result: Evaluation) -> Batch:
    """The longest of the images that were read, the first of those."""
    first = max(result.batches, key=lambda batch: int(batch["length"].max()))
    place = int(first["length"].argmax())
    return {name: values[place : place + 1] for name, values in first.items()}


def _noisy(result: Evaluation, batch: Batch, level: int) -> tuple[Tensor, Tensor]:
    """The image with the noise that it was read with, and its alpha."""
    clean = result.task.images(batch)[0]
    root = torch.tensor(result.levels.snr[level], device=clean.device).float().sqrt()
    alpha = root / (1 + root)
    return alpha * clean + (1 - alpha) * normal(batch["draw"], clean.shape[1:], stream=1 + level), alpha


def _page(result: Evaluation, batch: Batch, path: Path) -> None:
    level = int(np.abs(result.levels.accuracy(UNIGRAM) - _PAGE).argmin())
    names, length, size = result.trained.names(), int(batch["length"]), result.task.data.img_size
    found = read(result.task, result.trained.network, batch, *_noisy(result, batch, level), result.bigram)
    pages = {reader: _spelled(tokens, length, names) for reader, (tokens, _) in found.items()}
    order = sorted(pages, key=lambda reader: result.levels.accuracy(reader)[level])
    title = f"A text of {result.split}, {100 * result.levels.shares[level]:.0f} % of the information left by the noise"
    plot_page({each: pages[each] for each in order}, _spelled(batch["tokens"], length, names), size, path, title)


def _strip(result: Evaluation, batch: Batch, path: Path) -> None:
    names, length, encoding = result.trained.names(), int(batch["length"]), result.task.encoding
    count, wanted, rows = len(result.levels.shares), batch["tokens"].flatten()[:length], []
    for level in np.unique(np.linspace(0, count - 1, _ROWS + 2).round().astype(int))[1:-1]:
        x, alpha = _noisy(result, batch, level)
        tokens, guess = read(result.task, result.trained.network, batch, x, alpha, None)[NETWORK]
        wrong = (tokens.flatten()[:length] != wanted).cpu().numpy()
        label = (
            f"{100 * result.levels.shares[level]:.0f} % of the\ninformation\n"
            f"t = {result.levels.times[level]:.3g}\n{100 * (1 - wrong.mean()):.0f} % right"
        )
        rows.append(Row(label, [_image(x / alpha, encoding), _image(guess, encoding)],
                        _spelled(tokens, length, names), wrong.tolist()))  # fmt: skip
    heads = ["noisy", "denoised", "its text (wrong tokens red)"]
    plot_rows(rows, heads, path, f"A text of {result.split} at {len(rows)} levels of noise, in one step of denoising")


def plot_way(way: list[Frame], length: int, names: list[str], encoding: Encoding, path: Path) -> None:
    """Some steps of how one text of `length` tokens came out of noise. names: of each token."""
    rows = []
    for step in np.unique(np.linspace(1, len(way), _ROWS + 1).round().astype(int)):
        x, guess = way[step - 1]
        label, text = f"step {step}\nof {len(way)}", _spelled(encoding.decode(guess), length, names)
        rows.append(Row(label, [_image(x, encoding), _image(guess, encoding)], text, [False] * length))
    plot_rows(rows, ["image", "guess", "nearest tokens of the guess"], path, "From noise to text")


def _image(x: Tensor, encoding: Encoding) -> np.ndarray:
    return colors(x, encoding).reshape(*x.shape[-3:-1], 3).cpu().numpy()


def _spelled(tokens: Tensor, length: int, names: list[str]) -> list[str]:
    return [names[token] for token in tokens.flatten()[:length].tolist()]
