from __future__ import annotations

import pickle
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trunkline.engine.data.store_writer import draft_of
from trunkline.engine.errors import DataError
from trunkline.models.causal_lm.data import Packed, Padded, Pairs, Piece, collate, collate_pairs
from trunkline.models.causal_lm.records import Kind
from trunkline.models.causal_lm.rendering import Rendered
from trunkline.models.causal_lm.store import Sequences
from trunkline.models.causal_lm.store_writer import StoreWriter
from trunkline.models.causal_lm.tokenizer import MIN_VOCAB_SIZE, train_tokenizer
from trunkline.models.text.linear_loss import IGNORE

PAD = 7


@pytest.fixture
def sequences_of(tmp_path_factory: pytest.TempPathFactory):
    """A store's sequences: each of the given lengths counts up from 1000 times its number; mask by letters."""

    def make(kind: Kind, *given: int | str) -> Sequences:
        out = tmp_path_factory.mktemp("data") / "store"
        with draft_of(out) as draft:
            train_tokenizer([], MIN_VOCAB_SIZE).save_pretrained(draft / "tokenizer")
            with StoreWriter(draft, kind, 60_000) as writer:
                step = 2 if kind == "preferences" else 1
                rendered = []
                for number, what in enumerate(given):
                    mask = "x" * what if isinstance(what, int) else what
                    ids = 1000 * number + np.arange(len(mask))
                    rendered.append(Rendered(ids, np.array([letter == "x" for letter in mask], bool)))
                for i in range(0, len(rendered), step):
                    writer.add("train", rendered[i : i + step])
                return writer.finish(out).split("train")

    return make


def predictions(batch: dict[str, torch.Tensor]) -> Counter[tuple[int, int]]:
    """(token, the token to predict after it), each as often as it is predicted."""
    predicted = batch["targets"] != IGNORE
    return Counter(zip(batch["input_ids"][predicted].tolist(), batch["targets"][predicted].tolist()))


@pytest.mark.parametrize("max_length", [2, 3, 8, 512])
@pytest.mark.parametrize("dataset", [Padded, Packed])
def test_each_token_of_a_text_but_the_first_is_predicted_once(sequences_of, dataset: type, max_length: int) -> None:
    lengths = [9, 1, 2, 8, 0, 15, 16, 3]
    data = dataset(sequences_of("text", *lengths), "text", max_length)
    samples = [data[i] for i in range(len(data))]
    batch = collate(samples, PAD)
    expected = {(1000 * s + t, 1000 * s + t + 1) for s, n in enumerate(lengths) for t in range(n - 1)}
    assert predictions(batch) == Counter(expected)
    assert batch["input_ids"].shape[1] == -(-min(max_length, int(data.lengths.max())) // 16) * 16
    assert data.lengths.max() <= max_length


@given(st.lists(st.integers(2, 40), min_size=1, max_size=8), st.integers(2, 12))
def test_pieces_of_any_texts_cover_them(lengths: list[int], max_length: int) -> None:
    class Counting:
        """Only what the datasets ask of sequences."""

        def __init__(self) -> None:
            self.lengths = np.array(lengths, np.int64)

        def tokens(self, index: int, start: int, stop: int) -> np.ndarray:
            return 1000 * index + np.arange(start, stop)

        def loss_mask(self, index: int, start: int, stop: int) -> np.ndarray:
            return np.ones(stop - start, bool)

    data = Padded(Counting(), "text", max_length)  # type: ignore[arg-type]
    pieces = [data[i].tokens.tolist() for i in range(len(data))]
    assert all(2 <= len(piece) <= max_length for piece in pieces)
    pairs = Counter(pair for piece in pieces for pair in pairwise(piece))
    assert pairs == Counter((1000 * s + t, 1000 * s + t + 1) for s, n in enumerate(lengths) for t in range(n - 1))


def test_a_batch_written_out(sequences_of) -> None:
    data = Padded(sequences_of("conversations", "..xx", ".x"), "conversations", 512)
    batch = collate([data[0], data[1]], PAD)
    assert set(batch) == {"input_ids", "targets", "position_ids"}
    assert all(value.dtype == torch.int64 and value.shape == (2, 16) for value in batch.values())
    assert batch["input_ids"][:, :5].tolist() == [[0, 1, 2, 3, PAD], [1000, 1001, PAD, PAD, PAD]]
    assert batch["targets"][:, :5].tolist() == [[-100, 2, 3, -100, -100], [1001, -100, -100, -100, -100]]
    assert batch["position_ids"][:, :5].tolist() == [[0, 1, 2, 3, 0], [0, 1, 0, 0, 0]]
    assert (batch["targets"][:, 5:] == IGNORE).all()


def test_a_packed_batch_written_out(sequences_of) -> None:
    data = Packed(sequences_of("conversations", ".xx", ".x", "..xx.", "x" * 8), "conversations", 8)
    assert len(data) == 3
    assert data.lengths.tolist() == [8, 8, 2]
    batch = collate([data[1], data[2]], PAD)
    assert batch["input_ids"][:, :9].tolist() == [
        [2000, 2001, 2002, 2003, 2004, 0, 1, 2, PAD],
        [1000, 1001, *[PAD] * 7],
    ]
    assert batch["targets"][0, :9].tolist() == [IGNORE, 2002, 2003, IGNORE, IGNORE, 1, 2, IGNORE, IGNORE]
    assert batch["position_ids"][0, :9].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0]
    assert batch["document"][:, :9].tolist() == [[0, 0, 0, 0, 0, 1, 1, 1, -1], [0, 0, *[-1] * 7]]
    assert data.notes == ["4 pieces are packed into 3 rows, 75.0% full"]


def test_packed_and_padded_predict_the_same(sequences_of) -> None:
    sequences = sequences_of("conversations", *(".." + "x" * n for n in range(1, 30)))
    padded, packed = (dataset(sequences, "conversations", 20) for dataset in (Padded, Packed))
    assert len(packed) < len(padded)
    one, other = (collate([data[i] for i in range(len(data))], PAD) for data in (padded, packed))
    assert predictions(one) == predictions(other)


def test_long_conversations_are_cut_and_those_without_an_answer_left_out(sequences_of) -> None:
    sequences = sequences_of("conversations", "....xx", "..xx", "xx", "x...", "...x", "....")
    data = Padded(sequences, "conversations", 4)
    assert [data[i].tokens[0] for i in range(len(data))] == [1000, 2000, 4000]
    assert data.notes == [
        "1 of 6 conversations are longer than data.max_length = 4 and cut off on the right",
        "3 of 6 conversations are left out, because no token of the answer is left to be predicted",
    ]
    longer = Padded(sequences, "conversations", 5)
    assert longer[0].tokens.tolist() == [0, 1, 2, 3, 4]
    assert len(longer[0].learned) == 5


def test_texts_that_predict_nothing_are_left_out_with_a_note(sequences_of) -> None:
    data = Padded(sequences_of("text", 9, 1, 0, 3), "text", 4)
    assert [data[i].tokens.tolist() for i in range(len(data))] == [
        *([0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8]),
        [3000, 3001, 3002],
    ]
    assert data.notes == [
        "1 of 4 documents are longer than data.max_length = 4 and cut into 3 pieces",
        "2 of 4 documents are shorter than two tokens, predict nothing and are left out",
    ]


def test_pairs_stay_together(sequences_of) -> None:
    given = ["..xx", "..x", "..xxx", "....x", "...x", "..."]  # the second loses its rejected answer, the third has none
    data = Pairs(sequences_of("preferences", *given), 4)
    assert len(data) == 1
    assert data.notes == [
        "1 of 3 pairs are longer than data.max_length = 4 and cut off on the right",
        "2 of 3 pairs are left out, because no token of the answer is left to be predicted",
    ]
    both = Pairs(sequences_of("preferences", *given), 5)
    assert len(both) == 2
    assert both.lengths.tolist() == [4, 5]
    batch = collate_pairs([both[0], both[1]], PAD)
    assert {name: value.shape for name, value in batch.items()} == dict.fromkeys(
        ["input_ids", "targets", "position_ids"], torch.Size([2, 2, 16])
    )
    assert batch["input_ids"][:, :, 0].tolist() == [[0, 1000], [2000, 3000]]
    assert batch["targets"][0, :, :4].tolist() == [[-100, 2, 3, -100], [-100, 1002, -100, -100]]
    assert batch["position_ids"][1, 1, :6].tolist() == [0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize("dataset", [Padded, Packed])
def test_nothing_to_learn_is_an_error(sequences_of, dataset: type) -> None:
    with pytest.raises(DataError, match=r"no documents to learn from: 2 of 2 documents are shorter.*raise data\.max_"):
        dataset(sequences_of("text", 1, 1), "text", 8)
    with pytest.raises(DataError, match="the split is empty"):
        dataset(sequences_of("text"), "text", 8)
    with pytest.raises(DataError, match=r"data\.max_length is 1: use 2 or more"):
        dataset(sequences_of("text", 4), "text", 1)


def test_padding_is_to_a_multiple_of_sixteen() -> None:
    def width(*lengths: int) -> int:
        pieces = [Piece(np.arange(n), np.ones(n, bool)) for n in lengths]
        return collate(pieces, PAD)["input_ids"].shape[1]

    assert [width(2), width(16), width(17), width(3, 33)] == [16, 16, 32, 48]


def test_a_pickled_dataset_gives_the_same_samples(sequences_of) -> None:
    data = Packed(sequences_of("text", 9, 5, 3), "text", 8)
    copied = pickle.loads(pickle.dumps(data))
    for i in range(len(data)):
        for one, other in zip(data[i], copied[i], strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
    with pytest.raises(IndexError):
        data[len(data)]


def test_a_million_documents_are_indexed_without_a_loop(tmp_path: Path) -> None:
    class Lengths:
        lengths = np.random.default_rng(0).integers(0, 2000, 1_000_000)

    data = Padded(Lengths(), "text", 512)  # type: ignore[arg-type]
    assert len(data) == sum(-(-(n - 1) // 511) for n in Lengths.lengths.tolist() if n > 1)
    assert (data.lengths - 1).sum() == (Lengths.lengths - 1).clip(min=0).sum()


def test_batches_are_never_longer_than_the_positions_of_a_model(sequences_of) -> None:
    samples = [Padded(sequences_of("text", 50), "text", 50)[0]]
    assert collate(samples, PAD)["input_ids"].shape == (1, 64)
    assert collate(samples, PAD, 50)["input_ids"].shape == (1, 50)
    assert collate(samples, PAD, 500)["input_ids"].shape == (1, 64)


def test_pairs_that_are_equal_after_the_cut_are_left_out_and_counted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(200):  # prompt of 3; the answers differ from a place on, or in their length, or not at all
        chosen = np.concatenate([[1, 2, 3], rng.integers(4, 9, rng.integers(1, 12))])
        rejected = chosen[: rng.integers(4, len(chosen) + 1)].copy()
        if rng.random() < 0.5:
            rejected[rng.integers(3, len(rejected))] = 9
        pairs.append((chosen, rejected))
    with draft_of(tmp_path / "store") as draft:
        train_tokenizer([], MIN_VOCAB_SIZE).save_pretrained(draft / "tokenizer")
        with StoreWriter(draft, "preferences", MIN_VOCAB_SIZE) as writer:
            for pair in pairs:
                writer.add("train", [Rendered(ids, np.arange(len(ids)) >= 3) for ids in pair])
            sequences = writer.finish(tmp_path / "store").split("train")
    for max_length in (4, 5, 9, 15):
        differ = [pair for pair in pairs if pair[0][:max_length].tolist() != pair[1][:max_length].tolist()]
        data = Pairs(sequences, max_length)
        found = [[side.tokens.tolist() for side in data[i]] for i in range(len(data))]
        assert found == [[side[:max_length].tolist() for side in pair] for pair in differ]
        assert (
            f"{200 - len(differ)} of 200 pairs are left out, because chosen and rejected are the same in their first "
            f"{max_length} tokens"
        ) in data.notes
    with pytest.raises(DataError, match="no pairs to learn from"):
        Pairs(sequences, 3)
