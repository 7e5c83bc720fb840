from __future__ import annotations

import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.models.image_classification.image_tree import pixels_of, png, write_image
from trunkline.models.image_classification import decode
from trunkline.models.image_classification.decode import BadImage, Size, check_header, read_image

SIXTEEN = np.array([[0, 255, 256, 257], [32768, 65279, 65280, 65535]], np.uint16)
EIGHT = np.array([[0, 0, 1, 1], [128, 254, 255, 255]], np.uint8)
GRAY, RGB, GRAY_ALPHA, RGB_ALPHA = 0, 2, 4, 6


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def _reason(path: Path) -> str:
    with pytest.raises(BadImage) as caught:
        read_image(path)
    return str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "bmp"])
def test_pixels_are_those_that_were_written(tmp_path: Path, suffix: str) -> None:
    assert np.array_equal(read_image(write_image(tmp_path / f"a.{suffix}")), pixels_of(f"a.{suffix}"))


@pytest.mark.parametrize("colour_type", [GRAY, RGB, GRAY_ALPHA, RGB_ALPHA])
def test_samples_of_16_bits_keep_their_upper_eight_whatever_the_colour_type(tmp_path: Path, colour_type: int) -> None:
    channels = {GRAY: [SIXTEEN], RGB: [SIXTEEN] * 3}
    opaque = np.full_like(SIXTEEN, 65535)
    channels |= {GRAY_ALPHA: [SIXTEEN, opaque], RGB_ALPHA: [SIXTEEN] * 3 + [opaque]}
    samples = np.stack(channels[colour_type], axis=-1)
    assert np.array_equal(read_image(_written(tmp_path / "a.png", png(samples, colour_type))), _gray(EIGHT))


@pytest.mark.parametrize("colour_type", [GRAY, RGB])
def test_the_transparent_colour_of_16_bits_is_white(tmp_path: Path, colour_type: int) -> None:
    samples = _gray(SIXTEEN)[..., : 1 if colour_type == GRAY else 3]
    transparent = struct.pack(">H", 32768) * samples.shape[-1]
    found = read_image(_written(tmp_path / "a.png", png(samples, colour_type, (b"tRNS", transparent))))
    assert np.array_equal(found, _gray(np.where(EIGHT == 128, 255, EIGHT)))


def test_what_is_transparent_stands_on_white(tmp_path: Path) -> None:
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
    found = read_image(write_image(tmp_path / "rgba.png", rgba))
    assert found.tolist() == [[[200, 0, 0], [255, 255, 255], [204, 204, 204]]]
    la = write_image(tmp_path / "la.png", np.array([[[10, 255], [10, 0]]], np.uint8))
    assert read_image(la).tolist() == [[[10] * 3, [255] * 3]]


def test_a_palette_gives_its_colours_and_its_transparency(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=1)
    assert read_image(tmp_path / "opaque.png").tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    assert read_image(tmp_path / "clear.png").tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[False, True]])).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").tolist() == [[[0] * 3, [255] * 3]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_that_exif_says_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = pixels_of("a", 3, 5)
    turns = [lambda a: a, np.fliplr, lambda a: a[::-1, ::-1], np.flipud]
    # how each camera holds the sensor: what it stores of an upright picture
    stored = [
        *turns,
        *(lambda a, turn=turn: turn(a).swapaxes(0, 1) for turn in (turns[0], turns[1], turns[2], turns[3])),
    ]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored[orientation - 1](upright))).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), upright)


def _cmyk(adobe: bool) -> bytes:
    """A JPEG whose file holds the values 0, 255, 255, 255 everywhere."""
    buffer = io.BytesIO()
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(buffer, "JPEG", quality=100)  # inverted, with Adobe's mark
    data = buffer.getvalue()
    mark = data.index(b"\xff\xee")
    (length,) = struct.unpack(">H", data[mark + 2 : mark + 4])
    return data if adobe else data[:mark] + data[mark + 2 + length :]


@pytest.mark.parametrize(("adobe", "rgb"), [(True, [0, 255, 255]), (False, [0, 0, 0])])
def test_cmyk_becomes_rgb_and_is_inverted_where_adobe_marks_it(tmp_path: Path, adobe: bool, rgb: list[int]) -> None:
    found = read_image(_written(tmp_path / "a.jpg", _cmyk(adobe)))
    assert np.abs(found.astype(int) - rgb).max() <= 2  # what JPEG rounds


def test_of_an_animation_the_first_frame_counts_whatever_the_suffix(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "lime")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "a.gif").rename(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == [255, 0, 0]).all()


def test_a_square_is_pillows_antialiased_bilinear_resize(tmp_path: Path) -> None:
    pixels = pixels_of("a.png", 40, 60)
    found = read_image(write_image(tmp_path / "a.png", pixels), Size(square=16))
    assert np.array_equal(found, Image.fromarray(pixels).resize((16, 16), Image.Resampling.BILINEAR))


@pytest.mark.parametrize(
    ("height", "width", "shape"), [(40, 60, (16, 24)), (61, 40, (24, 16)), (12, 60, (12, 60)), (1, 900, (1, 900))]
)
def test_a_short_side_keeps_the_aspect_and_never_enlarges(
    tmp_path: Path, height: int, width: int, shape: tuple[int, int]
) -> None:
    path = write_image(tmp_path / "a.png", pixels_of("a.png", height, width))
    assert read_image(path, Size(short_side=16)).shape == (*shape, 3)


def test_a_file_that_is_no_image_says_why(tmp_path: Path) -> None:
    assert _reason(_written(tmp_path / "a.jpg", b"")) == "the file is empty"
    assert _reason(_written(tmp_path / "a.jpg", b"hello")).startswith("not an image of JPEG, PNG")
    assert _reason(tmp_path / "no.jpg") == "No such file or directory"
    (tmp_path / "folder.jpg").mkdir()
    assert "it is a folder" in _reason(tmp_path / "folder.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "it is a named pipe" in _reason(tmp_path / "pipe.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp"])
def test_a_file_that_is_cut_short_anywhere_is_never_half_an_image(tmp_path: Path, suffix: str) -> None:
    data = write_image(tmp_path / f"whole.{suffix}").read_bytes()
    for share in (0.05, 0.3, 0.6, 0.95):
        said = _reason(_written(tmp_path / f"a.{suffix}", data[: int(len(data) * share)]))
        assert said
        assert "\n" not in said
        assert str(tmp_path) not in said


def test_a_damaged_png_says_why(tmp_path: Path) -> None:
    data = bytearray(png(pixels_of("a"), RGB))
    data[len(data) // 2] ^= 0xFF
    assert _reason(_written(tmp_path / "a.png", bytes(data)))


def test_a_bomb_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = struct.pack(">IIBBBBB", 50_000, 50_000, 8, RGB, 0, 0, 0)
    data = png(pixels_of("a"), RGB)
    crc = struct.pack(">I", __import__("zlib").crc32(b"IHDR" + huge))
    path = _written(tmp_path / "a.png", data[:16] + huge + crc + data[33:])
    assert "more than the 89,478,485 pixels" in _reason(path)
    with pytest.raises(BadImage, match="89,478,485 pixels"):
        check_header(path)
    small = write_image(tmp_path / "b.png")
    monkeypatch.setattr(decode, "MAX_PIXELS", 20 * 24 - 1)
    assert _reason(small).startswith("24 x 20, more than")
    monkeypatch.setattr(decode, "MAX_FILE_BYTES", 100)
    assert _reason(small).startswith("larger than")


def test_32_bits_a_sample_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tiff")
    assert _reason(tmp_path / "a.tiff").startswith("32 bits a sample")


def test_a_header_is_checked_without_the_pixels(tmp_path: Path) -> None:
    data = write_image(tmp_path / "a.png").read_bytes()
    check_header(_written(tmp_path / "b.png", data[: len(data) // 2]))
