"""One file with an image -> its pixels, uint8 RGB [H, W, 3], as a person would see them.

    pixels = read_image(path, Size(square=224))      resized to 224 x 224, whatever its shape
    pixels = read_image(path, Size(short_side=256))  shrunk until its shorter side is 256; never enlarged
    pixels = read_image(path)                        as it is
    check_header(path)                               without the pixels: what can be said quickly

The first frame, upright as the EXIF orientation says. Samples of 16 bits keep their upper eight, so 65,535 is 255. What
is transparent stands on white. CMYK becomes RGB, also where a JPEG holds it inverted, as Adobe's programs write it.
Colour profiles are passed over, as they are elsewhere. Resizing is Pillow's bilinear filter, which is antialiased. A
file is told by its content, not by its name.

Raises BadImage with the reason in one line: what cannot be read, is cut short, is damaged, is no image, or is larger
than MAX_FILE_BYTES or MAX_PIXELS.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trunkline.engine.machine.reading import open_regular, reason

MAX_FILE_BYTES = 1 << 28
MAX_PIXELS = 89_478_485
"""Of one image, 256 MiB of RGB: where Pillow, too, begins to suspect a decompression bomb."""
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF")
"""Those that are often met under the name of another; Pillow would also try formats that start other programs."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_NO_RANGE = {"I", "F"}  # 32 bits a sample, of which nothing says what is white

# bounds are ours, and a reason is raised; Pillow's warnings would run through the progress bar
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(Exception):  # noqa: N818  # it is told, not thrown at anybody
    """Why a file gives no image, in one line that does not name the file."""


@dataclass(frozen=True)
class Size:
    """What images are resized to: a square, or a shorter side at most; at most one of the two, in pixels."""

    square: int | None = None
    short_side: int | None = None

    def of(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of an image of these."""
        if self.square is not None:
            return self.square, self.square
        short = min(width, height)
        if self.short_side is None or short <= self.short_side:
            return width, height
        return max(1, width * self.short_side // short), max(1, height * self.short_side // short)


def read_image(path: str | Path, size: Size = Size()) -> NDArray[np.uint8]:
    """uint8 [H, W, 3]. Raises BadImage."""
    with _reasons(), open_regular(path) as file:
        image = _opened(file)
        of_16_bits = "16B" in str(getattr(image, "tile", ""))
        image.load()
        rgb = _rgb(_upright(image), of_16_bits)
        if (wanted := size.of(*rgb.size)) != rgb.size:
            rgb = rgb.resize(wanted, Image.Resampling.BILINEAR)
        return np.asarray(rgb)


def check_header(path: str | Path) -> None:
    """Raises BadImage for a file that is no image as far as its first bytes say. Its pixels are not decoded."""
    with _reasons(), open_regular(path) as file:
        _opened(file)


@contextmanager
def _reasons() -> Iterator[None]:
    try:
        yield
    except BadImage:
        raise
    except Exception as error:  # decoders raise all kinds of errors of damaged files: struct.error, SyntaxError, ...
        raise BadImage(reason(error) or type(error).__name__) from error


def _opened(file: BufferedReader) -> Image.Image:
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise BadImage("the file is empty")
    if size > MAX_FILE_BYTES:
        raise BadImage(f"larger than {MAX_FILE_BYTES >> 20} MiB")
    try:
        image = Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise BadImage(f"not an image of {', '.join(FORMATS[:-1])} or {FORMATS[-1]}") from None
    except Image.DecompressionBombError:
        raise BadImage(f"more than the {MAX_PIXELS:,} pixels that are read: shrink it") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width:,} x {height:,}, more than the {MAX_PIXELS:,} pixels that are read: shrink it")
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # EXIF that cannot be read says nothing of the pixels, and viewers pass over it
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _rgb(image: Image.Image, of_16_bits: bool) -> Image.Image:
    if image.mode in _NO_RANGE:
        raise BadImage("32 bits a sample, of which nothing says which is white: save it with 8 or 16")
    if image.mode.startswith("I;16"):
        return _rgb_of_16_bits(image)
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        # Pillow takes every JPEG's CMYK as inverted, which is a habit of Adobe's programs alone
        image = image.point(lambda value: 255 - value)
    if image.has_transparency_data:
        if of_16_bits and image.mode == "RGB":  # Pillow holds the upper bits of the pixels, and all of the colour
            image.info["transparency"] = tuple(value >> 8 for value in image.info["transparency"])
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _rgb_of_16_bits(image: Image.Image) -> Image.Image:
    """The upper eight bits, as Pillow itself does with colour, so that gray is the same in gray and in RGB files."""
    samples = np.asarray(image).astype(np.uint16)
    gray = (samples >> 8).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        gray[samples == transparent] = 255
    return Image.fromarray(gray).convert("RGB")
