"""Small folders of images, of which every pixel is known."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def pixels_of(name: str, height: int = 20, width: int = 24) -> NDArray[np.uint8]:
    """uint8 [H, W, 3], drawn by the name."""
    return np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (height, width, 3), np.uint8)


def write_image(path: Path, pixels: NDArray[np.uint8] | None = None) -> Path:
    """Write pixels, by default those of the file's name, in the format that its suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels_of(path.name) if pixels is None else pixels).save(path)
    return path


def write_tree(root: Path, names: Iterable[str]) -> Path:
    """Write an image for each name below `root`: "train/cat/1.png"."""
    for name in names:
        write_image(root / name, pixels_of(name))
    return root


SMALL = tuple(
    f"{split}/{cls}/{place}.png"
    for split, count in (("train", 4), ("val", 2))
    for cls in ("cat", "dog")
    for place in range(count)
)
"""Two classes, 8 images to train on and 4 to validate on."""


def png(samples: NDArray[np.uint16] | NDArray[np.uint8], colour_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of samples [H, W] or [H, W, channels], as its specification says and no library is asked."""
    depth = 8 * samples.dtype.itemsize
    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    every = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in every
    )
