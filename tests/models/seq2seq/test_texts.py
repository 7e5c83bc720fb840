from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.models.seq2seq.toy_data import toy_run, toy_store, write_lines
from trunkline.engine.errors import ConfigError, DataError
from trunkline.models.registry import make_task
from trunkline.models.seq2seq.prepare import prepare
from trunkline.models.seq2seq.store import Store
from trunkline.models.seq2seq.texts import Texts
from trunkline.models.text.linear_loss import IGNORE

EOS = 1


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store.open(toy_store(tmp_path_factory.mktemp("texts"), "text"))


@pytest.mark.parametrize("length", [2, 3, 7, 30, 1000])
def test_texts_are_cut_into_pieces(store: Store, length: int) -> None:
    held, found = store.column("train", "input"), Texts(store, "train", length, EOS, joined=False)
    whole = [held.tokens(number) for number in range(len(held))]
    expected = [text[at : at + length] for text in whole for at in range(0, len(text), length)]
    alone = [piece for piece in expected if len(piece) == 1]
    assert [found[place].tolist() for place in range(len(found))] == [p.tolist() for p in expected if len(p) > 1]
    assert found.lengths.tolist() == [len(piece) for piece in expected if len(piece) > 1]
    cut = [len(text) for text in whole if len(text) > length]
    notes = []
    if cut:
        pieces = sum(-(-size // length) for size in cut)
        notes.append(f"{len(cut)} of {len(whole)} texts are longer than {length} tokens and cut into {pieces} pieces")
    if alone:
        notes.append(f"{len(alone)} pieces of a single token, which cannot lose a span, are left out")
    assert found.notes == notes


@pytest.mark.parametrize("length", [2, 3, 7, 30, 100_000])
def test_joined_texts_are_one_stream_with_eos_between_them(store: Store, length: int) -> None:
    held, found = store.column("train", "input"), Texts(store, "train", length, EOS, joined=True)
    stream: list[int] = []
    for number in range(len(held)):
        stream += [EOS] * (number > 0) + held.tokens(number).tolist()
    pieces = [stream[at : at + length] for at in range(0, len(stream), length)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    assert [found[place].tolist() for place in range(len(found))] == pieces
    assert found.lengths.tolist() == [len(piece) for piece in pieces]
    assert (found.lengths[:-1] == length).all()
    assert found.notes[0].startswith(f"{len(held)} texts are joined and cut into ")


def test_texts_of_one_token_are_nothing_to_learn_from(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "t.jsonl", *({"text": "x"} for _ in range(9)))
    store, _ = prepare(
        [source], tmp_path / "s", kind="text", vocab_size=358, val_sources=[write_lines(tmp_path / "v.jsonl", "ab c")]
    )
    with pytest.raises(DataError, match="the split train holds no text of two tokens or more"):
        Texts(store, "train", 8, EOS, joined=False)
    joined = Texts(store, "train", 8, EOS, joined=True)
    assert len(joined[0]) == 8


def test_the_corruption_of_an_evaluation_is_one_and_of_training_another_each_epoch(
    store: Store, tmp_path: Path
) -> None:
    from trunkline.engine.config.deepspeed_section import BatchSizes
    from trunkline.engine.data.loading import evaluation_loader, training_loader
    from trunkline.engine.data.order import GlobalBatches

    task = make_task(toy_run(tmp_path, store.root))

    def trained(world: int, rank: int, workers: int, epochs: int = 2) -> dict[tuple[int, bytes], bytes]:
        data, sizes = task.dataset("train"), BatchSizes(4, 4 // world, 1, world)
        batches, found = GlobalBatches(len(data), 4, 7), {}
        steps = training_loader(
            task, data, batches, sizes, rank, first_step=0, last_step=epochs * batches.per_epoch, num_workers=workers,
            pin_memory=False,
        )  # fmt: skip
        for step, (batch,) in enumerate(steps):
            whole = task.complete(batch)
            assert task.weight(batch) == (whole["targets"][batch["valid"]] != IGNORE).sum()
            for row in np.flatnonzero(batch["valid"].numpy()):
                length = int(batch["length"][row])
                targets = whole["targets"][row]
                found[batches.epoch(step), batch["texts"][row, :length].numpy().tobytes()] = (
                    targets[targets >= 0].numpy().tobytes()
                )
        return found

    alone = trained(1, 0, 0)
    assert alone == trained(2, 0, 0) | trained(2, 1, 0)
    assert alone == trained(1, 0, 2)
    texts = {text for _, text in alone if len(text) > 30 * 8}
    assert texts
    assert sum(alone[0, text] != alone[1, text] for text in texts) > 0.8 * len(texts)

    def evaluated() -> list[bytes]:
        loader = evaluation_loader(
            task, task.dataset("val"), num_samples=None, micro_batch_size=4, world_size=1, rank=0
        )
        return [task.complete(batch)["targets"].numpy().tobytes() for batch in loader]

    assert evaluated() == evaluated()


def test_a_tokenizer_without_sentinels_lends_the_model_s_free_ids(store: Store, tmp_path: Path) -> None:
    import shutil

    from trunkline.models.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(store.root / "tokenizer")
    assert [tokenizer.convert_ids_to_tokens(number) for number in (0, 1)] == ["<pad>", "</s>"]
    raw = (store.root / "tokenizer/tokenizer.json").read_text().replace("<extra_id_", "<other_")
    folder = tmp_path / "tokenizer"
    shutil.copytree(store.root / "tokenizer", folder)
    (folder / "tokenizer.json").write_text(raw)
    settings = (folder / "tokenizer_config.json").read_text().replace("<extra_id_", "<other_")
    (folder / "tokenizer_config.json").write_text(settings)
    source = write_lines(
        tmp_path / "t.jsonl", *({"text": f"gas {number} falls along each pipe"} for number in range(80))
    )
    other, _ = prepare([source], tmp_path / "text", kind="text", tokenizer=folder)
    free = {"vocab_size": other.vocab_size + 2}
    task = make_task(toy_run(tmp_path / "a", other.root, model=free))
    batch = task.collate([np.arange(2, 36)] * 2)
    assert batch["sentinels"].tolist() == [[other.vocab_size + 1, other.vocab_size]] * 2
    with pytest.raises(ConfigError, match=r"from a text of 34 tokens 2 spans are taken out, but there are 1 sentinels"):
        make_task(toy_run(tmp_path / "b", other.root, model={"vocab_size": other.vocab_size + 1}))


def test_settings_that_mean_nothing_to_texts_are_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.packed_source_length: texts are cut to fill"):
        make_task(toy_run(tmp_path / "a", store.root, data={"packing": True, "packed_source_length": 64}))
    with pytest.raises(ConfigError, match=r"no text from which a span is taken out fits: use 3 or more for both"):
        make_task(toy_run(tmp_path / "b", store.root, data={"max_source_length": 2}))
