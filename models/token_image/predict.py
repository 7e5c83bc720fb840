"""Texts from a trained denoiser: what `launchers/predict.py` does for this workload.

    (nothing)           make up texts
    --prompt TEXT       continue a text
    --text TEXT         fill in the tokens that are unknown: each "_" is one, or another --mask
    --denoise TEXT      put noise on a text, of --time, and take it off in one step

Texts go to the terminal, or to --out: of each its text, its image (NNN.png), the pixels that hold a token
(NNN-mask.png), and of the first the way from noise (frames.png).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from trunkline.engine.checkpoint.weights import described
from trunkline.engine.data.randomness import mix
from trunkline.engine.errors import ConfigError
from trunkline.engine.machine.files import made_folder
from trunkline.models.text.fields import checked_text
from trunkline.models.text.sources import BadRecord
from trunkline.models.token_image.conversion import Converter
from trunkline.models.token_image.data import collate_tokens
from trunkline.models.token_image.generation import Condition, Frame, frames, kept, read_once, until_end
from trunkline.models.token_image.network import CONDITION_GRID
from trunkline.models.token_image.noise import LAST, noised
from trunkline.models.token_image.plots import colors, write_image
from trunkline.models.token_image.records import Record
from trunkline.models.token_image.sampler import Method
from trunkline.models.token_image.shown import plot_way
from trunkline.models.token_image.trained import Trained, load_trained

STEPS, TIME, MASK = 50, 500.0, "_"
_UNKNOWN = -1


@dataclass(frozen=True)
class Wanted:
    """tokens: int64 [n], of which -1 is unknown. condition: int64 [m], or None. whole: whether the end is known."""

    tokens: np.ndarray
    condition: np.ndarray | None = None
    whole: bool = False


def run(arguments: argparse.Namespace) -> int:
    """Make texts, print or write them. Returns the exit status. Raises ConfigError or CheckpointError."""
    _check(arguments)
    trained = load_trained(arguments.run, arguments.device)
    wanted = asked(trained, arguments)
    out = None if arguments.out is None else made_folder(arguments.out)
    print(described(trained.folder), file=sys.stderr)  # what is made goes to stdout
    if arguments.denoise is not None:
        made = denoised(
            trained, wanted, TIME if arguments.time is None else arguments.time, arguments.samples, arguments.seed
        )
    else:
        made = texts(
            trained, wanted, arguments.samples, arguments.steps or STEPS, arguments.method or "heun", arguments.seed,
            arguments.batch_size,
        )  # fmt: skip
    for place, each in enumerate(
        tqdm(made, total=arguments.samples, desc="make texts", unit="text", disable=out is None)
    ):
        if out is None:
            print(f"{'-' * 72}\n" * bool(place) + each.text, flush=True)
        else:
            _write(trained, each, out, place)
    if out is not None:
        print(f"wrote {arguments.samples:,} texts to {out}")
    return 0


@dataclass(frozen=True)
class Made:
    """tokens: int64 [n], EOS included where there is one. way: of the first text, how it came about."""

    tokens: list[int]
    text: str
    way: list[Frame]


def texts(
    trained: Trained, wanted: Wanted, count: int, steps: int, method: Method, seed: int, batch_size: int = 16
) -> Iterator[Made]:
    """`count` different texts that keep to what is known."""
    for first in range(0, count, batch_size):
        size = min(batch_size, count - first)
        tokens, length, condition = _batch(trained, wanted, size)
        given = None if (wanted.tokens == _UNKNOWN).all() else (tokens.clamp(min=0), tokens >= 0)
        last, way = kept(frames(
            trained.network, trained.data.img_size, length, steps=steps, method=method, seed=seed, first=first,
            condition=condition, given=given,
        ))  # fmt: skip
        rows = trained.network.encoding.decode(last.x)
        if wanted.whole:  # what is known behind a gap stays, whatever fills it
            found = [row[: len(wanted.tokens)] for row in rows.flatten(1).tolist()]
        else:
            found = until_end(rows, length, trained.eos)
        for place, row in enumerate(found):
            yield Made(row, trained.tokenizer.decode(row, skip_special_tokens=True), [] if first + place else way)


@torch.no_grad()
def denoised(trained: Trained, wanted: Wanted, time: float, count: int, seed: int) -> Iterator[Made]:
    """What the network reads of a text with noise of that time, drawn `count` times. What is right is said."""
    network, length = trained.network, len(wanted.tokens)
    tokens, _, condition = _batch(trained, wanted, 1)
    held = (tokens >= 0).view(1, *[trained.data.img_size] * 2)
    clean = network.encoding.encode(tokens.clamp(min=0)).view(*held.shape, -1) * held[..., None]
    t = torch.full((1,), time, device=trained.device)
    alpha = network.alpha(t)
    for place in range(count):
        x = noised(clean, alpha, torch.tensor([mix(seed, place)], device=trained.device))
        found, guess = read_once(network, x, t, held, condition)
        nearest = network.encoding.decode(x / alpha.view(1, 1, 1, 1).clamp(min=1e-6))
        right, plain = (int((each.flatten()[:length] == tokens[0, :length]).sum()) for each in (found, nearest))
        print(f"{right} of {length} tokens right; {plain} by the nearest code alone", file=sys.stderr)
        row = found.flatten()[:length].tolist()
        yield Made(row, trained.tokenizer.decode(row, skip_special_tokens=True), [Frame(x[0], guess[0])] * (place == 0))


def _batch(trained: Trained, wanted: Wanted, size: int) -> tuple[Tensor, Tensor, Condition]:
    """Tokens int64 [size, S S], -1 where they are unknown or there are none; lengths [size]; the condition."""
    pixels = trained.data.img_size**2
    tokens, length = collate_tokens([wanted.tokens] * size, pixels, fill=_UNKNOWN)
    if wanted.condition is None:
        return tokens.to(trained.device), length.to(trained.device), ()
    before, many = (each.to(trained.device) for each in collate_tokens([wanted.condition] * size, pixels))
    held = torch.arange(pixels, device=trained.device) < many[:, None]
    image = trained.network.encoding.encode(before) * held[..., None]
    square = (trained.data.img_size,) * 2
    return tokens.to(trained.device), length.to(trained.device), (image.unflatten(1, square), held.unflatten(1, square))


def asked(trained: Trained, arguments: argparse.Namespace) -> Wanted:
    """The tokens that the flags ask for. Raises ConfigError for what does not fit."""
    most = trained.data.capacity
    condition = None
    if arguments.condition is not None:
        if not trained.model.condition:
            raise ConfigError("--condition: this network has no places for one (model.condition): leave it out")
        if trained.kind == "texts":
            raise ConfigError("--condition: this network learned texts without one: leave it out, or use --prompt")
        if max(grid := trained.network.jit.grid) > CONDITION_GRID:
            raise ConfigError(
                f"--condition: this network cuts an image into {grid[0]} x {grid[1]} patches (model.patch), and a "
                f"condition has {CONDITION_GRID} x {CONDITION_GRID} at most: leave it out, or train with larger patches"
            )
        ids = _tokens(trained, arguments.condition, "--condition")
        if len(ids) >= most:
            raise ConfigError(
                f"--condition: {len(ids):,} tokens and EOS are more than the {most:,} that fit: shorten it"
            )
        condition = np.append(ids, trained.eos)
    if arguments.text is None and arguments.denoise is None:
        length = most if arguments.length is None else arguments.length
        if length > most:
            raise ConfigError(f"--length {length}: an image holds {most:,} tokens: use no more")
        known = [] if arguments.prompt is None else _tokens(trained, arguments.prompt, "--prompt")
        if len(known) >= length:
            raise ConfigError(f"--prompt: {len(known):,} tokens leave no room in {length:,}: shorten it")
        return Wanted(np.array([*known, *[_UNKNOWN] * (length - len(known))]), condition)
    flag, text = ("--denoise", arguments.denoise) if arguments.text is None else ("--text", arguments.text)
    mask = arguments.mask or MASK
    ids = list[int]()
    for place, part in enumerate(text.split(mask) if flag == "--text" else [text]):
        ids += [_UNKNOWN] * (place > 0)
        ids += _tokens(trained, part, flag) if part else []
    if flag == "--text" and _UNKNOWN not in ids:
        raise ConfigError(f"--text: holds no {mask!r}, which stands for an unknown token: put some in, or name --mask")
    if not ids or len(ids) > most:
        raise ConfigError(f"{flag}: {len(ids):,} tokens; an image holds 1 to {most:,}: give another text")
    return Wanted(np.array([*ids, trained.eos][:most]), condition, whole=True)


def _tokens(trained: Trained, text: str, flag: str) -> list[int]:
    try:
        text.encode() if text.isspace() else checked_text(text, flag)
    except (BadRecord, UnicodeEncodeError) as bad:
        raise ConfigError(f"{flag}: no text in UTF-8, or an empty one: give at least a letter") from bad
    (found,) = Converter(trained.tokenizer, "texts")([Record(text)])
    if isinstance(found, str):
        raise ConfigError(f"{flag}: {found}")
    return list(found.columns[0])


def _check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for a value out of range or without effect."""
    for name in ("samples", "length", "steps", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: use 1 or more")
    if arguments.time is not None and not 0 <= arguments.time <= LAST:
        raise ConfigError(f"--time {arguments.time}: use 0, clean, to {LAST}, noise alone")
    if arguments.mask is not None and len(arguments.mask) != 1:
        raise ConfigError(f"--mask {arguments.mask!r}: use one character")
    of = {"mask": arguments.text is not None, "time": arguments.denoise is not None}
    of |= dict.fromkeys(("method", "steps"), arguments.denoise is None)
    of |= {"length": arguments.denoise is None and arguments.text is None}
    for name, has_effect in of.items():
        if getattr(arguments, name) is not None and not has_effect:
            raise ConfigError(f"--{name}: has no effect on what is asked for: leave it out")


def _write(trained: Trained, made: Made, out: Path, place: int) -> None:
    encoding, size, count = trained.network.encoding, trained.data.img_size, len(made.tokens)
    tokens = torch.tensor(made.tokens + [0] * (size**2 - count)).view(size, size)
    mask = (torch.arange(size**2) < count).view(size, size)
    (out / f"{place:03}.txt").write_text(made.text, encoding="utf-8", newline="")
    write_image(colors(encoding.encode(tokens), encoding) * mask[..., None], out / f"{place:03}.png")
    write_image(mask.float(), out / f"{place:03}-mask.png")
    if made.way:
        plot_way(made.way, count, trained.names(), encoding, out / "frames.png")
