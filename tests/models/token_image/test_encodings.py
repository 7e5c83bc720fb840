from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trunkline.models.token_image.encodings import RGB_CAPACITY, Encoding, Kind

KINDS: list[Kind] = ["rgb", "bits"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [1, 2, 3, 255, 256, 257, 65_536, 65_537, 152_064])
def test_every_id_comes_back_also_from_noise_below_half_of_what_lies_between_tokens(
    kind: Kind, vocab_size: int
) -> None:
    encoding, ids = Encoding(kind, vocab_size), torch.arange(vocab_size)
    pixels = encoding.encode(ids)
    assert pixels.shape == (vocab_size, encoding.channels)
    assert torch.equal(encoding.decode(pixels), ids)
    bound = 0.98 * encoding.min_distance / 2
    noise = torch.empty(pixels.shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(vocab_size))
    assert torch.equal(encoding.decode(pixels + noise), ids)
    assert torch.equal(encoding.decode(pixels + bound * noise.sign()), ids), "as far as it may be"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [2, 257, 65_537])
def test_no_two_ids_are_nearer_than_they_are_said_to_be(kind: Kind, vocab_size: int) -> None:
    encoding = Encoding(kind, vocab_size)
    some = encoding.encode(torch.arange(0, vocab_size, max(1, vocab_size // 300)))
    apart = (some[:, None] - some).abs().amax(-1).fill_diagonal_(torch.inf)
    assert apart.min() >= encoding.min_distance * (1 - 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_lies_beyond_the_colours_is_the_nearest_colour_and_never_wraps(dtype: torch.dtype) -> None:
    encoding = Encoding("rgb", RGB_CAPACITY)
    beyond = torch.tensor([-torch.inf, -1e9, -1.0, -0.01, 1.01, 256 / 255, 2.0, 1e9, torch.inf], dtype=dtype)
    for place in range(3):
        pixels = torch.zeros(len(beyond), 3, dtype=dtype)
        pixels[:, place] = beyond
        assert encoding.decode(pixels).tolist() == [0] * 4 + [255 * 256**place] * 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_pixel_that_is_no_number_becomes_an_id_and_spoils_no_other(kind: Kind) -> None:
    encoding = Encoding(kind, 4096)
    pixels = encoding.encode(torch.tensor([7, 4095]))
    pixels[0] = torch.nan
    assert encoding.decode(pixels).tolist() == [0, 4095]


@pytest.mark.parametrize("kind", KINDS)
@given(values=st.lists(st.floats(-3, 3), min_size=17, max_size=17), vocab_size=st.integers(1, 100_000))
def test_whatever_is_decoded_is_an_id_of_the_vocabulary(kind: Kind, values: list[float], vocab_size: int) -> None:
    encoding = Encoding(kind, vocab_size)
    found = encoding.decode(torch.tensor(values[: encoding.channels]))
    assert 0 <= int(found) < vocab_size


def test_rgb_is_the_id_in_base_256_with_the_lowest_digit_first() -> None:
    pixels = Encoding("rgb", RGB_CAPACITY).encode(torch.tensor([1 + 2 * 256 + 3 * 65536]))
    assert torch.allclose(pixels, torch.tensor([[1.0, 2.0, 3.0]]) / 255)


def test_rgb_bears_an_error_below_half_a_digit_and_no_larger_one() -> None:
    encoding, ids = Encoding("rgb", 65_536), torch.tensor([1000, 65_535])
    assert torch.equal(encoding.decode(encoding.encode(ids) + 0.0019), ids)
    assert not torch.equal(encoding.decode(encoding.encode(ids) - 0.0021), ids)


def test_bits_bear_an_error_below_one() -> None:
    encoding, ids = Encoding("bits", 4096), torch.arange(4096)
    noise = torch.empty(4096, 12).uniform_(-0.99, 0.99)
    assert encoding.channels == 12
    assert torch.equal(encoding.decode(encoding.encode(ids) + noise), ids)


@pytest.mark.parametrize("vocab_size", [0, RGB_CAPACITY + 1])
def test_a_vocabulary_that_cannot_be_told_apart_is_refused(vocab_size: int) -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        Encoding("rgb", vocab_size)
