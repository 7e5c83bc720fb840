from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trunkline.models.token_image.encodings import RGB_CAPACITY, Encoding, Kind

KINDS: list[Kind] = ["rgb", "bits"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [1, 2, 256, 257, 65_537, 151_936])
def test_every_id_comes_back(kind: Kind, vocab_size: int) -> None:
    encoding, ids = Encoding(kind, vocab_size), torch.arange(vocab_size)
    pixels = encoding.encode(ids)
    assert pixels.shape == (vocab_size, encoding.channels)
    assert torch.equal(encoding.decode(pixels), ids)


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
