from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.models.token_image.conftest import TEXTS
from trunkline.engine.errors import DataError
from trunkline.models.text.byte_tokenizer import plain_bytes
from trunkline.models.text.column_store import ColumnWriter
from trunkline.models.token_image.config import TokenImageData, TokenImageModel
from trunkline.models.token_image.data import Sample, Texts, collate
from trunkline.models.token_image.store import Store
from trunkline.models.token_image.task import TokenImageTask

EOS = 20_000
"""No token of the texts here: token n of a text is n + 1."""


def numbered(folder: Path, lengths: Sequence[int], conditions: Sequence[int] | None = None) -> Store:
    """The splits "train" and "val", both with texts, and conditions, of these lengths."""
    (draft := folder / "draft").mkdir(parents=True)
    plain_bytes().save_pretrained(draft / "tokenizer")
    kind = "texts" if conditions is None else "dialogues"
    with ColumnWriter(draft, Store, kind, EOS + 1, ["train", "val"]) as writer:
        for split, place in itertools.product(("train", "val"), range(len(lengths))):
            columns = [lengths[place]] if conditions is None else [lengths[place], conditions[place]]
            writer.add(split, *(list(range(1, length + 1)) for length in columns))
        return writer.finish(folder / "store")


@pytest.fixture(scope="module")
def all_lengths(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Texts of 0 to 60 tokens."""
    return numbered(tmp_path_factory.mktemp("lengths"), range(61))


def images_of(text: list[int], capacity: int, stride: int | None) -> list[list[int]]:
    """What the images of a text hold, said plainly."""
    if stride is None:
        return [[*text, EOS][:capacity] if len(text) <= capacity else [*text[: capacity - 1], EOS]]
    found, start = [], 0
    while not found or start - stride + capacity < len(text):  # the image before did not hold the end
        found.append(text[start : start + capacity])
        start += stride
    if len(found[-1]) < capacity:
        found[-1].append(EOS)
    return found


def data_of(store: Store, img_size: int, max_tokens: int | None = None, stride: int | None = None) -> TokenImageData:
    return TokenImageData(store=str(store.root), img_size=img_size, max_tokens=max_tokens, stride=stride)


@given(capacity=st.integers(2, 25), stride=st.none() | st.integers(1, 25), split=st.sampled_from(["train", "val"]))
def test_images_are_those_of_a_plain_loop_over_all_texts(
    all_lengths: Store, capacity: int, stride: int | None, split: str
) -> None:
    stride = None if stride is None else min(stride, capacity)
    used = stride if split == "train" or stride is None else capacity
    samples = Texts(all_lengths, split, data_of(all_lengths, 5, capacity, stride), EOS)
    expected = [images_of([*range(1, length + 1)], capacity, used) for length in range(61)]
    found = [samples[index].text.tolist() for index in range(len(samples))]
    assert found == [image for images in expected for image in images]
    assert all(1 <= len(image) <= capacity for image in found)
    if stride is not None:
        whole = {token for length in range(61) for token in range(1, length + 1)}
        for length, images in enumerate(expected):
            held = {token for image in images for token in image}
            assert held - {EOS} == {token for token in whole if token <= length}, "no token is lost"
            assert [EOS in image for image in images][:-1] == [False] * (len(images) - 1)
            assert (EOS in images[-1]) or len(images[-1]) == capacity, "EOS stands where there is room"


SEED_LENGTHS = [1, 127, 128, 129, 4_094, 4_095, 4_096, 10_000]


@pytest.fixture(scope="module")
def long_texts(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return numbered(tmp_path_factory.mktemp("long"), SEED_LENGTHS)


def test_texts_of_every_size_fill_an_image_of_64_x_64(long_texts: Store) -> None:
    samples = Texts(long_texts, "train", data_of(long_texts, 64), EOS)
    batch = collate([samples[index] for index in range(len(samples))], 64 * 64)
    assert batch["tokens"].shape == (len(SEED_LENGTHS), 4096)
    assert batch["length"].tolist() == [2, 128, 129, 130, 4_095, 4_096, 4_096, 4_096]
    for index, (row, length) in enumerate(zip(batch["tokens"], batch["length"].tolist(), strict=True)):
        expected = torch.zeros(4096, dtype=torch.long)
        expected[: length - 1], expected[length - 1] = torch.arange(1, length), EOS
        if index == SEED_LENGTHS.index(4_096):
            expected[-1] = 4_096  # a text that fills the image is whole, and there is no room for EOS
        assert torch.equal(row, expected)
    assert samples.notes == [
        "1 of 8 texts are longer than 4,096 tokens and cut off; 5,905 tokens are lost: data.stride makes further "
        "images of them"
    ]


def test_a_stride_keeps_all_of_a_long_text_for_training_and_validates_without_overlap(long_texts: Store) -> None:
    data = data_of(long_texts, 64, stride=3_000)
    train, val = (Texts(long_texts, split, data, EOS) for split in ("train", "val"))
    found = [train[index].text for index in range(len(train))]
    assert [(image[0], len(image)) for image in found[-5:]] == [
        (1, 4_096), (1, 4_096),  # of 4,095 tokens and EOS, and of 4,096
        (1, 4_096), (3_001, 4_096), (6_001, 4_001),
    ]  # fmt: skip
    assert [len(val[index].text) for index in range(len(val))][-5:] == [4_096, 4_096, 4_096, 4_096, 1_809]
    assert not train.notes


def test_max_tokens_is_the_capacity_and_the_image_keeps_its_size(long_texts: Store) -> None:
    samples = Texts(long_texts, "train", data_of(long_texts, 64, max_tokens=128), EOS)
    batch = collate([samples[index] for index in range(4)], 64 * 64)
    assert batch["length"].tolist() == [2, 128, 128, 128]
    assert batch["tokens"][3, 126:129].tolist() == [127, EOS, 0]


def test_conditions_are_cut_like_texts_and_said_to_be_and_none_has_no_tokens(tmp_path: Path) -> None:
    store = numbered(tmp_path, [10, 40, 5], conditions=[3, 100, 0])
    samples = Texts(store, "train", data_of(store, 4), EOS)
    batch = collate([samples[index] for index in range(3)], 16)
    assert batch["length"].tolist() == [11, 16, 6]
    assert batch["tokens"][1].tolist() == [*range(1, 16), EOS]
    assert batch["condition_length"].tolist() == [4, 16, 0]
    assert batch["condition"].tolist() == [[1, 2, 3, EOS, *[0] * 12], [*range(1, 16), EOS], [0] * 16]
    assert [note.partition(" tokens")[0] for note in samples.notes] == [
        "1 of 3 texts are longer than 16", "1 of 3 conditions are longer than 16"
    ]  # fmt: skip
    assert "85 tokens are lost: raise data.img_size or data.max_tokens" in samples.notes[1]


def test_a_batch_may_mix_samples_with_and_without_a_condition() -> None:
    mixed = [Sample(np.array([1, 2])), Sample(np.array([3]), np.array([4, 5]))]
    batch = collate(mixed, 4)
    assert batch["condition"].tolist() == [[0] * 4, [4, 5, 0, 0]]
    assert batch["condition_length"].tolist() == [0, 2]
    assert "condition" not in collate(mixed[:1], 4)


def test_a_mixed_batch_costs_what_its_samples_cost_alone(dialogues: Path) -> None:
    """Also where a sample alone has no condition, and one among others has none."""
    model = TokenImageModel(patch=4, d_model=32, num_layers=2, num_heads=2)
    task = TokenImageTask(TokenImageData(store=str(dialogues), img_size=16), model)
    torch.manual_seed(0)
    network = task.build_model()
    for value in network.parameters():  # some begin at zero
        torch.nn.init.normal_(value, std=0.1)
    conditioned = task.dataset("train")
    mixed = [Sample(conditioned[0].text), conditioned[1], Sample(conditioned[2].text), conditioned[3]]

    def loss(samples: Sequence[Sample], draws: Sequence[int]) -> float:
        batch = task.collate(samples)
        batch |= {"valid": torch.ones(len(samples), dtype=torch.bool), "draw": torch.tensor(draws)}
        with torch.no_grad():
            return float(task.loss(network, batch)["loss"])

    alone = [loss([sample], [draw]) for draw, sample in enumerate(mixed)]
    assert loss(mixed, range(4)) == pytest.approx(sum(alone), rel=1e-5)
    unconditioned = loss([Sample(conditioned[1].text)], [1])
    assert abs(unconditioned - alone[1]) > 1e-3 * alone[1], "a condition is seen"


def test_every_id_of_a_batch_is_one_of_the_vocabulary(dialogues: Path) -> None:
    """EOS and padding, too: a sampler that decodes ids stops only if EOS is one that it can decode."""
    store = Store.open(dialogues)
    eos = store.tokenizer().eos_token_id
    assert 0 <= eos < store.vocab_size
    samples = Texts(store, "train", TokenImageData(store=str(dialogues), img_size=8), eos)
    batch = collate([samples[index] for index in range(len(TEXTS))], 64)
    for name in ("tokens", "condition"):
        assert 0 <= int(batch[name].min()) <= int(batch[name].max()) < store.vocab_size


def test_an_index_outside_and_an_empty_split_are_errors(all_lengths: Store, tmp_path: Path) -> None:
    samples = Texts(all_lengths, "train", data_of(all_lengths, 4), EOS)
    for index in (-1, len(samples)):
        with pytest.raises(IndexError, match=f"sample {index} of 61"):
            samples[index]
    with pytest.raises(DataError, match="no split 'test': use one of train, val"):
        Texts(all_lengths, "test", data_of(all_lengths, 4), EOS)
    empty = numbered(tmp_path, [])
    with pytest.raises(DataError, match="the split train is empty: prepare other data"):
        Texts(empty, "train", data_of(empty, 4), EOS)
