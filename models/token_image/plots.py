"""Pictures of an evaluation, as PNG files, drawn without a display.

plot_accuracy(levels, path)       tokens read right by noise, for all readers
plot_errors(levels, path, ...)    squared errors over those by frequencies, by share of information
plot_learning(found, lines, path) bits a token by step, with those of n-gram models as lines
plot_page(pages, wanted, path)    one page of text as pixels, read several ways, wrong pixels red
plot_rows(rows, path)             images beside the text they stand for, wrong tokens red
colors(x, encoding)               channels as red, green and blue
write_image(pixels, path)         a PNG of whole pixels, each blown up to a square
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from trunkline.engine.record.pictures import BLUE, GREY, INK, RED, picture
from trunkline.models.token_image.encodings import Encoding
from trunkline.models.token_image.levels import BIGRAM, NEAREST, NETWORK, UNIGRAM, Levels

_COLORS = {NETWORK: BLUE, BIGRAM: RED, UNIGRAM: GREY, NEAREST: GREY}
_PALE = "#e9edf2"
_WIDTH, _LINES = 64, 4  # characters of a text that is shown
_ADVANCE = 0.602  # of DejaVu Sans Mono, in its size
_LETTERED = 16  # pixels along an edge, up to which they hold a letter
_LEAST_EDGE = 512  # of a PNG


def plot_accuracy(levels: Levels, path: Path) -> None:
    """The share of tokens read right at each level of noise."""
    with picture(path, 7, 3.8) as figure:
        axes = figure.subplots()
        for reader in _COLORS:
            if reader in levels.right:
                axes.plot(
                    100 * levels.shares, 100 * levels.accuracy(reader), ":" if reader == NEAREST else "-",
                    label=reader, color=_COLORS[reader], marker="o", markersize=3,
                )  # fmt: skip
        axes.set_xlabel("information in the noisy pixels (% of what frequencies leave open; 0: noise, 100: clean)")
        axes.set_ylabel("tokens read right (%)")
        axes.set_xlim(0, 100)
        axes.set_ylim(-2, 102)
        axes.legend(loc="upper left")


def plot_errors(levels: Levels, path: Path) -> None:
    """The squared error over that of the posterior by frequencies. The area below 1 is the share of bits saved."""
    share, network = 100 * levels.shares, levels.error(NETWORK)
    with picture(path, 7, 3.8) as figure:
        axes = figure.subplots()
        axes.axhline(1, color=GREY, label=f"{UNIGRAM}: {levels.bits(UNIGRAM):.4g} bits a token")
        saved = levels.bits(UNIGRAM) - levels.bits(NETWORK)
        width, label = 100 / len(share), f"area: {abs(saved):.4g} bits {'saved' if saved >= 0 else 'lost'}"
        axes.bar(share, network - 1, width, bottom=1, color=BLUE, alpha=0.15, label=label)
        for reader in (BIGRAM, NETWORK):
            if reader in levels.errors:
                label = f"{reader}: {levels.bits(reader):.4g} bits a token"
                axes.plot(share, levels.error(reader), label=label, color=_COLORS[reader], marker="o", markersize=3)
        axes.set_xlabel("information in the noisy pixels (% of what frequencies leave open)")
        axes.set_ylabel(f"squared error / that of the {UNIGRAM}")
        axes.set_xlim(0, 100)
        axes.set_ylim(0, max(1.08, min(2.0, 1.05 * float(network.max()))))
        axes.legend(loc="lower left" if network[0] > 0.5 else "upper right")


def plot_learning(found: Sequence[tuple[int, float]], lines: Mapping[str, float], path: Path, split: str) -> None:
    """Bits a token of the validations of a run, (step, bits), beside those of models of `split`, by name."""
    with picture(path, 7, 3.8) as figure:
        axes = figure.subplots()
        for name, bits in lines.items():
            axes.axhline(bits, color=GREY, linestyle=":")
            axes.annotate(
                f"{name}, {split}", (0, bits), xycoords=("axes fraction", "data"), xytext=(4, 2),
                textcoords="offset points", ha="left", va="bottom", fontsize=8, color=GREY,
            )  # fmt: skip
        axes.plot(*zip(*found), label=f"{NETWORK}, validation", color=BLUE, marker="o", markersize=3)
        axes.set_xlabel("step")
        axes.set_ylabel("bits a token")
        axes.set_xlim(left=0)
        axes.legend(loc="best")


def plot_page(pages: Mapping[str, Sequence[str]], wanted: Sequence[str], size: int, path: Path, title: str) -> None:
    """One page of `size` x `size` tokens, row by row: by reader the tokens as text, wrong ones red, and the truth."""
    panels = dict(pages) | {"the text": wanted}
    edge = 2.6
    with picture(path, edge * len(panels), edge + 0.6, **{"axes.grid": False}) as figure:
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
        for axes, (reader, tokens) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
            wrong = np.array([found != right for found, right in zip(tokens, wanted, strict=True)])
            pixels = np.full((size * size, 3), 1.0)
            pixels[: len(wanted)] = np.where(wrong[:, None], _rgb(RED), _rgb(_PALE))
            axes.imshow(pixels.reshape(size, size, 3), interpolation="nearest")
            right = f"{100 * (1 - wrong.mean()):.0f} % right" if reader in pages else "no noise"
            axes.set_title(f"{reader}\n{right}", fontsize=9)
            axes.set_axis_off()
            if size <= _LETTERED:
                for place, (token, bad) in enumerate(zip(tokens, wrong, strict=True)):
                    axes.text(
                        place % size, place // size, _shown(token)[:1], ha="center", va="center", fontsize=7,
                        family="monospace", color="white" if bad else INK, parse_math=False,
                    )  # fmt: skip


@dataclass(frozen=True)
class Row:
    """label: what the row is; images: fp32 [S, S, 3], 0 to 1; text: its tokens; wrong: bool, which of them are."""

    label: str
    images: Sequence[np.ndarray]
    text: Sequence[str]
    wrong: Sequence[bool]


def plot_rows(rows: Sequence[Row], heads: Sequence[str], path: Path, title: str) -> None:
    """A line a row: its label, its images, its text. heads: what each image and the text is."""
    widths = [1.15, *(1.0 for _ in rows[0].images), 6.2]
    with picture(path, sum(widths) + 0.4, 1.06 * len(rows) + 0.75, **{"axes.grid": False}) as figure:
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
        grid = figure.subplots(len(rows), len(widths), squeeze=False, width_ratios=widths)
        for line, (row, panels) in enumerate(zip(rows, grid)):
            for axes in panels:
                axes.set_axis_off()
            panels[0].text(0, 0.5, row.label, va="center", fontsize=8)
            for axes, image in zip(panels[1:], row.images):
                axes.imshow(image, interpolation="nearest")
            _write(panels[-1], row, 72 * widths[-1] / (_WIDTH * _ADVANCE) * 0.97)
            if line == 0:
                for axes, head in zip(panels[1:], heads):
                    axes.set_title(head, fontsize=9)


def _write(axes: Axes, row: Row, size: float) -> None:
    """The text in lines of equal width, characters of wrong tokens red."""
    letters = [(letter, bad) for token, bad in zip(row.text, row.wrong, strict=True) for letter in _shown(token)]
    axes.set_xlim(0, _WIDTH)
    axes.set_ylim(_LINES, 0)
    for line in range(_LINES):
        part = letters[line * _WIDTH : (line + 1) * _WIDTH]
        for bad, color in ((False, INK), (True, RED)):
            text = "".join(letter if wrong == bad else " " for letter, wrong in part)
            if text.strip():
                axes.text(
                    0, line + 0.5, text, va="center", fontsize=size, family="DejaVu Sans Mono", color=color,
                    parse_math=False, weight="bold" if bad else "normal",
                )  # fmt: skip


def _shown(token: str) -> str:
    """A token as characters that a picture has."""
    return "".join("↵" if letter == "\n" else letter if letter.isprintable() else "·" for letter in token) or "·"


def _rgb(color: str) -> tuple[float, ...]:
    return tuple(int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))


def colors(x: Tensor, encoding: Encoding) -> Tensor:
    """fp32 [..., 3] of pixels [..., C], for the eye: rgb as it is, bits as three numbers of as many bits each.

    Without noise each is a multiple of 1/255, or of 1 over the largest number of its bits, and so survives a PNG.
    """
    if encoding.kind == "rgb":
        return x.float().clamp(0, 1)
    found = []
    for bits in torch.tensor_split((x.float() + 1) / 2, 3, -1):
        weights = 2.0 ** torch.arange(bits.shape[-1] - 1, -1, -1, device=x.device)
        found.append((bits @ weights) / weights.sum().clamp(min=1))
    return torch.stack(found, -1).clamp(0, 1)


def write_image(pixels: Tensor, path: Path) -> None:
    """[S, S, 3] or [S, S], 0 to 1, as PNG; each pixel a square, so that an edge has 512 at least."""
    from PIL import Image

    times = -(-_LEAST_EDGE // pixels.shape[0])
    values = (pixels.float() * 255).round().to(torch.uint8).cpu()
    Image.fromarray(values.repeat_interleave(times, 0).repeat_interleave(times, 1).numpy()).save(path)
