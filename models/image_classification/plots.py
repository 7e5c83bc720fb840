"""Pictures of a classifier: its confusion matrix, and sheets of images.

plot_confusion(confusion, classes, path)
plot_sheet(tiles, path, title)
shortened(name)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from trunkline.engine.record.pictures import BLUE, GREY, INK, RED, picture

_NUMBERED, _NAMED = 20, 60
"""Up to how many classes the cells have numbers, and the rows names."""
_PAIRS = 20
_LETTERS = 18
_CELLS = 150
_EDGE = 1.45  # inches


def shortened(name: str, letters: int = _LETTERS) -> str:
    """The name, cut in the middle if it is long."""
    half = (letters - 1) // 2
    return name if len(name) <= letters else f"{name[:half]}…{name[-half:]}"


def plot_confusion(confusion: NDArray[np.int64], classes: Sequence[str], path: Path) -> None:
    """The matrix [C, C], each row in shares of its class, and beside it the pairs that are confused most."""
    count = len(classes)
    names = [shortened(name) for name in classes]
    edge = float(np.clip(1.4 + 0.42 * count, 3.0, 9.0))
    pairs = _confused(confusion)
    width = edge + (4.2 if pairs else 1.0)
    with picture(path, width, max(edge + 0.3, 0.9 + 0.24 * len(pairs)), **{"axes.grid": False}) as figure:
        figure.get_layout_engine().set(h_pad=0.1)  # type: ignore[union-attr, call-arg]
        panels = figure.subplots(1, 2, width_ratios=[edge, 3.2]) if pairs else [figure.subplots()]
        axes = panels[0]
        shares = confusion / confusion.sum(axis=1, keepdims=True).clip(1)
        block = -(-count // _CELLS)
        # the square root shows what is rare, of which there is most
        drawn = axes.imshow(
            np.sqrt(_largest_of_blocks(shares, block)), cmap="Blues", vmin=0, vmax=1, interpolation="nearest",
            extent=(-0.5, count - 0.5, count - 0.5, -0.5),
        )  # fmt: skip
        bar = figure.colorbar(drawn, ax=axes, shrink=0.6, pad=0.02, ticks=np.sqrt([0, 0.01, 0.1, 0.3, 1]))
        bar.ax.set_yticklabels(["0", "1 %", "10 %", "30 %", "100 %"])
        bar.outline.set_visible(False)
        blocks = f", the largest of {block} x {block} classes" if block > 1 else ""
        axes.set_title(f"Share of each class by what it is taken for{blocks}")
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        if count <= _NAMED:
            small = 9 if count <= _NUMBERED else 6.5
            upright = count > 6 or max(map(len, names)) > 6
            axes.set_xticks(range(count), names, rotation=90 if upright and max(map(len, names)) > 2 else 0)
            axes.set_yticks(range(count), names)
            axes.tick_params(labelsize=small)
        if count <= _NUMBERED:
            _write_numbers(axes, confusion, shares)
        if pairs:
            _draw_pairs(panels[1], pairs, names)


def _largest_of_blocks(shares: NDArray[np.float64], edge: int) -> NDArray[np.float64]:
    """[ceil(C / edge), ceil(C / edge)] of [C, C]."""
    starts = np.arange(0, len(shares), edge)
    return np.maximum.reduceat(np.maximum.reduceat(shares, starts, axis=0), starts, axis=1)


def _write_numbers(axes: Axes, confusion: NDArray[np.int64], shares: NDArray[np.float64]) -> None:
    size = 8 if confusion.max() < 1000 else 6.5
    for (row, column), value in np.ndenumerate(confusion):
        if value:
            colour = "white" if shares[row, column] > 0.4 else INK
            axes.text(column, row, f"{value}", ha="center", va="center", color=colour, fontsize=size)


def _confused(confusion: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """The pairs (true, predicted, images) that are confused most, the most first."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_PAIRS]
    pairs = [(int(true), int(predicted)) for true, predicted in zip(*np.unravel_index(order, wrong.shape), strict=True)]
    return [(true, predicted, int(wrong[true, predicted])) for true, predicted in pairs if wrong[true, predicted]]


def _draw_pairs(axes: Axes, pairs: Sequence[tuple[int, int, int]], names: Sequence[str]) -> None:
    places = np.arange(len(pairs))
    counts = [images for *_, images in pairs]
    axes.barh(places, counts, color=RED, height=0.66)
    axes.set_yticks(places, [f"{names[true]} as {names[predicted]}" for true, predicted, _ in pairs], fontsize=8)
    axes.set_ylim(max(len(pairs), 8) - 0.5, -0.7)
    axes.set_xlim(0, 1.15 * max(counts))
    for place, images in enumerate(counts):
        axes.text(images, place, f" {images}", va="center", fontsize=8, color=GREY)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_title("Confused most often, images")


@dataclass(frozen=True)
class Tile:
    """An image [H, W, 3], of bytes or of 0 ... 1, and the lines above it; one that is wrong has a red line below."""

    image: NDArray[np.generic]
    lines: Sequence[str] = ()
    is_wrong: bool = False


def plot_sheet(tiles: Sequence[Tile], path: Path, title: str, columns: int = 8) -> None:
    """The images in rows, each within a square."""
    columns = min(columns, max(len(tiles), 4))
    rows = -(-len(tiles) // columns)
    above = 0.14 * max((len(tile.lines) for tile in tiles), default=0) + 0.06
    row_height = 1 + above
    with picture(path, _EDGE * columns, _EDGE * rows * row_height + 0.4) as figure:
        figure.suptitle(title, fontsize=10, x=0.01, ha="left")
        axes = figure.subplots()  # one for all: the layout of many takes seconds
        axes.axis("off")
        for place, tile in enumerate(tiles):
            row, column = divmod(place, columns)
            height, width = (0.95 * edge / max(tile.image.shape[:2]) for edge in tile.image.shape[:2])
            left, bottom = column + (1 - width) / 2, (row + 1) * row_height
            interpolation = "nearest" if max(tile.image.shape[:2]) < 100 else "auto"
            axes.imshow(tile.image, interpolation=interpolation, extent=(left, left + width, bottom, bottom - height))
            axes.text(
                column + 0.5, bottom - height - 0.03, "\n".join(tile.lines),
                fontsize=7.5, ha="center", va="bottom", color=RED if tile.is_wrong else BLUE,
            )  # fmt: skip
        axes.set_xlim(0, columns)
        axes.set_ylim(rows * row_height, 0)
