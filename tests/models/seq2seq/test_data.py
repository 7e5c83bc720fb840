from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models.seq2seq.toy_data import toy_run, toy_store, write_lines
from trunkline.engine.data.randomness import seed_torch
from trunkline.engine.errors import ConfigError, DataError
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.models.registry import make_task
from trunkline.models.seq2seq.config import Seq2SeqData
from trunkline.models.seq2seq.data import Pair, PairSamples, collate
from trunkline.models.seq2seq.packing import Room
from trunkline.models.seq2seq.prepare import prepare
from trunkline.models.seq2seq.store import Store
from trunkline.models.seq2seq.turns import joined
from trunkline.models.text.linear_loss import IGNORE

PAD, EOS = 0, 1


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_store(tmp_path_factory.mktemp("pairs"), "pairs")


def store_of(folder: Path, *records: dict[str, Any]) -> Store:
    folder.mkdir(parents=True, exist_ok=True)
    source, val = write_lines(folder / "t.jsonl", *records), write_lines(folder / "v.jsonl", *records)
    return prepare([source], folder / "store", vocab_size=358, val_sources=[val])[0]


def limits(source: int, target: int, **more: Any) -> Seq2SeqData:
    return Seq2SeqData(store="x", max_source_length=source, max_target_length=target, **more)


def test_a_long_answer_is_cut_by_token_and_not_by_character(tmp_path: Path) -> None:
    answer = "gas " * 80  # 320 characters, and with a learned vocabulary far fewer tokens
    source = write_lines(tmp_path / "t.jsonl", *({"prompt": "q?", "response": answer} for _ in range(4)))
    store, _ = prepare(
        [source],
        tmp_path / "s",
        vocab_size=448,
        val_sources=[write_lines(tmp_path / "v.jsonl", {"prompt": "q", "response": "a"})],
    )
    samples, tokens = PairSamples(store, "train", limits(256, 256), EOS), store.column("train", "target").tokens(0)
    assert len(answer) > 251 > len(tokens)
    assert samples[0].target.tolist() == [*tokens.tolist(), EOS]
    assert store.tokenizer().decode(samples[0].target[:-1]) == answer
    assert samples.notes == []
    cut = PairSamples(store, "train", limits(256, 9), EOS)
    assert cut[0].target.tolist() == [*tokens[:8].tolist(), EOS]
    lost = 4 * (len(tokens) + 1 - 9)
    assert cut.notes == [
        f"4 of 4 responses are longer than data.max_target_length = 9 and cut off on the right; {lost} tokens are lost"
    ]
    assert cut.lengths.tolist() == [len(cut[place].input) + 9 for place in range(4)]


def test_a_talk_loses_its_oldest_turns_by_the_rule_of_turns(tmp_path: Path) -> None:
    talks = [["a b", "c", "d e f"], [], ["g"], ["long " * 9, "x"]]
    prompts = ["then?", "alone and far too long for any row", "h", "end"]
    records = [
        {"prompt": prompt, "response": "yes", "history": [{"role": "user", "content": turn} for turn in talk]}
        for prompt, talk in zip(prompts, talks)
    ]
    store = store_of(tmp_path, *records)
    tokenizer = store.tokenizer()
    encoded = [
        [tokenizer(turn, add_special_tokens=False)["input_ids"] for turn in (*talk, prompt)]
        for prompt, talk in zip(prompts, talks)
    ]
    for most in range(2, 70):
        samples = PairSamples(store, "train", limits(most, 8), EOS)
        expected = [joined(turns, EOS, most) for turns in encoded]
        assert [samples[place].input.tolist() for place in range(4)] == expected
        assert samples.sides[:, 0].tolist() == [len(tokens) for tokens in expected]
    said = PairSamples(store, "train", limits(12, 8), EOS).notes
    assert said[1].startswith("2 of 4 talks are longer than data.max_source_length = 12 and lose their oldest turns; ")
    assert said[0].startswith("1 of 4 prompts are longer than data.max_source_length = 12 and cut off on the right; ")


def test_a_batch_says_what_is_read_and_written_of_which_pair(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"prompt": "ab", "response": "c"}, {"prompt": "d", "response": "efg"})
    samples = PairSamples(store, "train", limits(16, 16), EOS)
    (ab, c), (d, efg) = ((pair.input.tolist(), pair.target.tolist()) for pair in (samples[0], samples[1]))
    assert (ab[-1], c[-1], d[-1], efg[-1]) == (EOS,) * 4
    batch = collate([[samples[0], samples[1]], [samples[1]]], PAD, Room(16, 16))
    two, three, four = len(ab), len(c), len(efg)
    assert batch["input_ids"].tolist() == [[*ab, *d] + [PAD] * (8 - two - len(d)), d + [PAD] * (8 - len(d))]
    assert batch["input_document"].tolist()[0] == [0] * two + [1] * len(d) + [-1] * (8 - two - len(d))
    assert batch["targets"].tolist()[0] == [*c, *efg] + [IGNORE] * (8 - three - four)
    assert batch["decoder_input_ids"].tolist()[0] == [PAD, *c[:-1], PAD, *efg[:-1]] + [PAD] * (8 - three - four)
    assert batch["target_document"].tolist()[0] == [0] * three + [1] * four + [-1] * (8 - three - four)


def test_samples_of_a_row_are_counted_from_0_so_their_numbers_are_below_its_length() -> None:
    shortest = Pair(np.array([EOS]), np.array([EOS]), -1)
    batch = collate([[shortest] * 24, [shortest] * 3], PAD, Room(24, 24))
    for side in ("input_document", "target_document"):
        assert batch[side].tolist() == [list(range(24)), [0, 1, 2] + [-1] * 21]


def test_rows_are_padded_to_eights_but_never_beyond_their_room(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"prompt": "x" * 10, "response": "y" * 10})
    pair = PairSamples(store, "train", limits(64, 64), EOS)[0]
    length = len(pair.input)
    widths = [collate([[pair]], PAD, Room(most, 64))["input_ids"].shape[1] for most in (length, length + 1, 64)]
    assert widths == [length, length + 1 if length % 8 else length, -(-length // 8) * 8]


def losses_of(task: Any, model: Any, batch: dict[str, torch.Tensor]) -> list[list[float]]:
    """The loss of each pair of each row."""
    read = {name: batch[name] for name in ("input_ids", "input_document", "decoder_input_ids", "target_document")}
    with torch.no_grad():
        loss = model(**read, targets=batch["targets"], reduction="none")
    documents = batch["target_document"]
    return [
        [float(loss[row][documents[row] == number].sum()) for number in range(int(documents[row].max()) + 1)]
        for row in range(len(documents))
    ]


def model_of(task: Any) -> Any:
    seed_torch(3)
    return task.build_model().eval()


@pytest.mark.parametrize("attention", ["trunkline", "sdpa", "eager"])
def test_a_packed_pair_has_the_loss_that_it_has_alone(pairs: Path, tmp_path: Path, attention: str) -> None:
    model = {"attention": attention}
    packed: Any = make_task(toy_run(tmp_path / "a", pairs, data={"packing": True}, model=model))
    padded: Any = make_task(toy_run(tmp_path / "b", pairs, model=model))
    network, rows, samples = model_of(packed), packed.dataset("train"), padded.dataset("train")
    assert sum(len(rows[place]) for place in range(len(rows))) == len(samples)
    assert max(len(rows[place]) for place in range(len(rows))) > 2
    places = range(min(len(rows), 6))
    found = losses_of(packed, network, packed.collate([rows[place] for place in places]))
    for place in places:
        alone = losses_of(padded, network, padded.collate(rows[place]))
        assert found[place] == pytest.approx([loss for (loss,) in alone], rel=1e-5)


@pytest.mark.parametrize("attention", ["trunkline", "sdpa"])
def test_a_pair_leaves_the_others_of_its_row_as_they_were(pairs: Path, tmp_path: Path, attention: str) -> None:
    task: Any = make_task(toy_run(tmp_path, pairs, data={"packing": True}, model={"attention": attention}))
    network, rows = model_of(task), task.dataset("train")
    row = next(row for row in map(rows.__getitem__, range(len(rows))) if len(row) > 3)
    before = losses_of(task, network, task.collate([row]))[0]
    for changed in range(len(row)):
        other = [pair._replace(input=pair.input.copy(), target=pair.target.copy()) for pair in row]
        other[changed].input[:-1] = 17
        other[changed].target[:-1] = 23
        after = losses_of(task, network, task.collate([other]))[0]
        assert [a == b for a, b in zip(before, after, strict=True)] == [place != changed for place in range(len(row))]


def test_the_weight_is_that_of_the_pairs_whether_packed_or_not(pairs: Path, tmp_path: Path) -> None:
    totals = []
    for packing in (False, True):
        task: Any = make_task(toy_run(tmp_path / str(packing), pairs, data={"packing": packing}))
        data = task.dataset("train")
        batch = task.collate([data[place] for place in range(len(data))])
        batch["valid"] = torch.ones(len(data), dtype=torch.bool)
        totals.append(int(task.weight(batch)))
        batch["valid"][0] = False
        first = [data[0]] if not packing else data[0]
        assert totals[-1] - int(task.weight(batch)) == sum(len(pair.target) for pair in first)
    assert (
        totals[0]
        == totals[1]
        == int(Store.open(pairs).column("train", "target").lengths.sum())
        + len(make_task(toy_run(tmp_path / "c", pairs)).dataset("train"))
    )


def test_the_room_of_a_row_is_said_and_part_of_what_a_resume_must_find(pairs: Path, tmp_path: Path) -> None:
    auto: Any = make_task(toy_run(tmp_path / "a", pairs, data={"packing": True}))
    room = auto._samples.room
    assert f"data.packed_source_length = {room.source}, data.packed_target_length = {room.target}" in auto.notes()
    assert any(
        note.startswith("train: ") and f"rows of {room.source} + {room.target} tokens" in note for note in auto.notes()
    )
    given = {"packing": True, "packed_source_length": room.source, "packed_target_length": room.target}
    assert make_task(toy_run(tmp_path / "b", pairs, data=given)).fingerprint() == auto.fingerprint()
    larger: Any = make_task(toy_run(tmp_path / "c", pairs, data=given | {"packed_target_length": room.target + 8}))
    prints = {task.fingerprint() for task in (auto, larger, make_task(toy_run(tmp_path / "d", pairs)))}
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"packing": True, "packed_source_length": 31},
            "packed_source_length 31 has no room for a sample of max_source",
        ),
        ({"packed_target_length": 64}, "packed_target_length goes with packing: set packing to true, or leave it out"),
        ({"packing": True, "packed_target_length": 1}, "packed_target_length"),
        ({"packing": True, "packed_target_length": "all"}, "packed_target_length"),
        ({"max_source_length": 1}, "max_source_length"),
    ],
)
def test_lengths_that_cannot_be_are_named(pairs: Path, tmp_path: Path, data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        toy_run(tmp_path, pairs, data=data)


def test_an_empty_split_is_named(tmp_path: Path) -> None:
    store = store_of(tmp_path, {"prompt": "ab", "response": "c"})
    with pytest.raises(DataError, match="no split 'test': use one of train, val"):
        PairSamples(store, "test", limits(8, 8), EOS)


def rows_of(folder: Path, split: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == split]


@pytest.mark.parametrize(
    ("kind", "packing"),
    [
        ("pairs", True),
        ("text", False),
        pytest.param("pairs", False, marks=pytest.mark.slow),
        pytest.param("text", True, marks=pytest.mark.slow),
    ],
)
def test_a_run_learns(pairs: Path, tmp_path: Path, kind: str, packing: bool) -> None:
    store = pairs if kind == "pairs" else toy_store(tmp_path, "text")
    settings = {"steps": 20, "eval_every": 20, "save_every": 20, "group_by_length": True, "num_workers": 2 * packing}
    config = toy_run(tmp_path, store, data={"packing": packing}, training=settings)
    Trainer(make_task(config), config, start(), tmp_path / "run").run()
    train = rows_of(tmp_path / "run", "train")
    assert np.isfinite(train).all()
    assert np.mean(train[-3:]) < 0.8 * train[0]
    assert rows_of(tmp_path / "run", "val")[-1] < 0.8 * train[0]


def test_a_run_over_texts_is_the_same_in_any_split_of_its_batches_and_resumes(tmp_path: Path) -> None:
    store = toy_store(tmp_path, "text")

    def run(name: str, steps: int, micro: int, resume: str = "none") -> list[float]:
        section = {"train_micro_batch_size_per_gpu": micro}
        settings = {"steps": steps, "eval_every": 9, "save_every": 9}
        config = toy_run(tmp_path / f"{name}{steps}", store, training=settings, deepspeed=section)
        Trainer(make_task(config), config, start(), tmp_path / name, resume=resume).run()
        return rows_of(tmp_path / name, "train")

    whole = run("whole", 3, 8)
    assert run("micro", 3, 2) == pytest.approx(whole, rel=1e-5)
    run("parts", 2, 8)
    assert run("parts", 3, 8, "auto") == whole
