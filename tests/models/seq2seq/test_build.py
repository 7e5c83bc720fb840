"""The networks that a configuration builds: shapes, heads, weights of folders and of state dicts, and what is wrong."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from tests.models.seq2seq.families import FAMILIES, GENERATION, write_folder
from tests.models.seq2seq.toy_pairs import SHAPE, toy_config
from trunkline.engine.data.randomness import seed_torch
from trunkline.engine.errors import CheckpointError, ConfigError, TrunklineError
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.models.registry import make_task
from trunkline.models.seq2seq.build import head_of, hf_config_of, load_weights, make_network, shell
from trunkline.models.seq2seq.config import Seq2SeqModel
from trunkline.models.seq2seq.network import Seq2Seq

IDS = torch.tensor([[5, 9, 300, 7, 1], [12, 1, 0, 0, 0]])
DOCUMENT = torch.tensor([[0, 0, 0, 0, 0], [0, 0, -1, -1, -1]])
START = torch.tensor([[0, 44, 45], [0, 46, 47]])


def model_of(**keys: Any) -> Seq2SeqModel:
    return Seq2SeqModel(**({} if "path" in keys or "preset" in keys else SHAPE) | keys)


def network_of(model: Seq2SeqModel) -> Seq2Seq:
    seed_torch(0, 0)
    return make_network(model, hf_config_of(model), head_of(model)).eval()


@torch.no_grad()
def our_logits(network: Seq2Seq) -> Tensor:
    return network.lm.lm_head(network.hidden(IDS, DOCUMENT, START, torch.zeros_like(START)))


@torch.no_grad()
def their_logits(folder: Path) -> Tensor:
    from transformers import AutoModelForSeq2SeqLM

    lm: Any = AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    return lm.eval()(input_ids=IDS, attention_mask=(DOCUMENT >= 0).long(), decoder_input_ids=START).logits


def elements(lm: Any) -> int:
    return sum(parameter.numel() for parameter in lm.parameters())


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("tiny", 1_017_856), ("small", 60_506_624), ("chat", 187_692_288), ("base", 222_903_552)],
)
def test_presets_have_these_numbers_of_parameters(preset: str, parameters: int) -> None:
    model = model_of(preset=preset)
    assert elements(shell(hf_config_of(model), head_of(model))) == parameters


def test_the_preset_chat_has_the_parts_of_chatlm_mini_chinese() -> None:
    model = model_of(preset="chat")
    lm = shell(hf_config_of(model), head_of(model))
    shared = elements(lm.shared)
    assert (shared, elements(lm.encoder) - shared, elements(lm.decoder) - shared) == (22500864, 70795392, 94396032)
    assert lm.lm_head.weight is lm.shared.weight


SOME = ("t5", "t5-1.1", "mt5")
"""The others open as one of these does."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_has_the_logits_that_transformers_gives_it(family: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", family)
    expected = their_logits(folder)
    for attention in ("trunkline", "sdpa", "eager"):
        network = network_of(model_of(path=str(folder), attention=attention))
        torch.testing.assert_close(our_logits(network), expected, rtol=1e-4, atol=1e-4)
    apart = family not in ("t5", "t5-1.1-tied")
    assert (network.lm.lm_head.weight is not network.lm.shared.weight) == apart


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in SOME else pytest.mark.slow) for name in FAMILIES]
)
def test_final_opens_in_transformers_with_the_same_names_logits_and_generation_settings(
    family: str, pairs: Path, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "model", family, pairs / "tokenizer")
    training = {"steps": 2, "eval_every": 2, "save_every": 2}
    config = toy_config(tmp_path, pairs, model={"path": str(folder)}, training=training)
    trainer = Trainer(make_task(config), config, start(), tmp_path / "run")
    trainer.run()
    final = tmp_path / "run/final"
    before, after = load_file(folder / "model.safetensors"), load_file(final / "model.safetensors")
    assert {name: x.shape for name, x in after.items()} == {name: x.shape for name, x in before.items()}
    assert all(not torch.equal(after[name], before[name]) for name in ("shared.weight", *after.keys() & {HEAD}))
    trained = network_of(model_of(path=str(final)))
    torch.testing.assert_close(our_logits(trained), their_logits(final), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(their_logits(final), their_logits(folder), atol=1e-3)
    generation = json.loads((final / "generation_config.json").read_text())
    assert generation.items() >= (GENERATION | {"decoder_start_token_id": 0, "pad_token_id": 0}).items()
    if family == "mt5":  # whose head is its own; other programs tie by this
        assert json.loads((final / "config.json").read_text())["tie_word_embeddings"] is False


HEAD = "lm_head.weight"


@pytest.mark.parametrize("family", ["new", "t5", pytest.param("t5-1.1-tied", marks=pytest.mark.slow)])
def test_a_head_that_is_untied_begins_with_the_same_logits_and_is_kept_apart(
    family: str, pairs: Path, tmp_path: Path
) -> None:
    path = {} if family == "new" else {"path": str(write_folder(tmp_path / "model", family, pairs / "tokenizer"))}
    tied, untied = (network_of(model_of(**path, tie_word_embeddings=tie)) for tie in (None, False))
    torch.testing.assert_close(our_logits(untied), our_logits(tied), rtol=1e-5, atol=1e-5)
    assert elements(untied) == elements(tied) + tied.lm.shared.weight.numel()
    config = toy_config(
        tmp_path, pairs, model={"tie_word_embeddings": False, "dropout": 0.0} | path,
        training={"steps": 2, "eval_every": 2, "save_every": 2},
    )  # fmt: skip
    task = make_task(config)
    Trainer(task, config, start(), tmp_path / "run").run()
    final = tmp_path / "run/final"
    held = load_file(final / "model.safetensors")
    assert not torch.allclose(held[HEAD], held["shared.weight"] * 32**-0.5, atol=1e-4)
    again = model_of(path=str(final))
    assert head_of(again) == "own"
    torch.testing.assert_close(our_logits(network_of(again)), their_logits(final), rtol=1e-4, atol=1e-4)


def test_a_head_of_its_own_is_not_tied(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "flan")
    with pytest.raises(ConfigError, match=r"tie_word_embeddings: the model of .* has a head of its own"):
        head_of(model_of(path=str(folder), tie_word_embeddings=True))


@pytest.mark.parametrize("kind", ["bin", "safetensors", "wrapped"])
@pytest.mark.parametrize("tie", [None, False])
def test_a_state_dict_gives_a_new_network_its_weights(kind: str, tie: bool | None, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "t5")
    state = load_file(folder / "model.safetensors")
    state |= {name: state["shared.weight"].clone() for name in ("encoder.embed_tokens.weight", HEAD)}
    path = tmp_path / f"weights.{'safetensors' if kind == 'safetensors' else 'bin'}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save({"module." + name: x for name, x in state.items()} if kind == "wrapped" else state, path)
    model = model_of(tie_word_embeddings=tie)
    network = network_of(model)
    assert str(path) in load_weights(network, path, head_of(model))
    torch.testing.assert_close(our_logits(network), their_logits(folder), rtol=1e-4, atol=1e-4)


def test_a_state_dict_with_a_head_of_its_own_fits_a_network_that_is_not_tied(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "flan")
    path = folder / "model.safetensors"
    gated = {"feed_forward_proj": "gated-gelu"}
    untied = model_of(tie_word_embeddings=False, **gated)
    network = network_of(untied)
    load_weights(network, path, head_of(untied))
    torch.testing.assert_close(our_logits(network), their_logits(folder), rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match=r"model\.weights: [^$]*set model\.tie_word_embeddings to false"):
        load_weights(network_of(model_of(**gated)), path, "tied")


def test_initialize_puts_model_weights_into_the_network_and_says_so(pairs: Path, tmp_path: Path) -> None:
    path = write_folder(tmp_path / "model", "t5") / "model.safetensors"
    config = toy_config(tmp_path, pairs, model={"weights": str(path)})
    task: Any = make_task(config)
    network = task.build_model().eval()
    task.initialize(network)
    torch.testing.assert_close(our_logits(network), their_logits(tmp_path / "model"), rtol=1e-4, atol=1e-4)
    assert any(note.startswith(f"{path}: ") for note in task.notes())


def damage(folder: Path, kind: str) -> None:
    path, config = folder / "model.safetensors", folder / "config.json"
    state, raw = load_file(path), json.loads(config.read_text())
    some = "decoder.block.1.layer.2.DenseReluDense.wo.weight"
    if kind == "missing":
        del state[some]
    elif kind == "integers":
        state[some] = (10 * state[some]).to(torch.int8)
    elif kind == "NaN":
        state[some][0, 0] = math.nan
    elif kind == "shape":
        state["shared.weight"] = state["shared.weight"][:-1].contiguous()
    elif kind == "cut":
        path.write_bytes(path.read_bytes()[:-100])
        return
    elif kind == "layers":
        raw["num_layers"] = 10_000
    elif kind == "distance":
        raw["relative_attention_max_distance"] = 16
    elif kind == "family":
        raw = {"model_type": "bert", "hidden_size": 32}
    elif kind == "start":
        raw["decoder_start_token_id"] = 3
    elif kind == "vocabulary":
        tokenizer = folder / "tokenizer.json"
        text = tokenizer.read_text(encoding="utf-8")
        tokenizer.write_text(text.replace("<extra_id_3>", "<extra_id_3333>"), encoding="utf-8")
    elif kind == "no weights":
        path.unlink()
        return
    elif kind == "no config":
        config.unlink()
        return
    save_file(state, path, metadata={"format": "pt"})
    config.write_text(json.dumps(raw))


def test_layers_that_the_configuration_does_not_have_are_named(pairs: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "t5", pairs / "tokenizer")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"num_decoder_layers": 1}))
    task = make_task(toy_config(tmp_path, pairs, model={"path": str(folder)}))
    task.build_model()
    named = [note for note in task.notes() if "are none of T5ForConditionalGeneration's: they are not trained" in note]
    assert len(named) == 1
    assert "decoder.block.1.layer.0.SelfAttention.k.weight" in named[0]


def test_relative_positions_are_refused_where_transformers_fails(pairs: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "t5", pairs / "tokenizer")
    raw = json.loads((folder / "config.json").read_text())
    ids = torch.full((1, 40), 5)
    for buckets, distance in itertools.product((0, 1, 2, 3, 4, 5, 8), (0, 1, 2, 3, 4, 5)):
        keys = {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": distance}
        fails = refused = False
        try:
            T5ForConditionalGeneration(T5Config(**raw | keys))(input_ids=ids, decoder_input_ids=ids)
        except (ZeroDivisionError, IndexError, ValueError):
            fails = True
        (folder / "config.json").write_text(json.dumps(raw | keys))
        try:
            hf_config_of(Seq2SeqModel(path=str(folder)))
        except ConfigError as error:
            refused = "config.json: relative_attention_" in str(error)
        assert refused is fails, (buckets, distance)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"missing or of another shape or kind: decoder\.block\.1"),
        ("integers", r"decoder\.block\.1\.layer\.2\.DenseReluDense\.wo\.weight holds no floating-point numbers"),
        ("NaN", r"holds NaN or infinity in decoder\.block\.1\.layer\.2\.DenseReluDense\.wo\.weight: give weights"),
        ("shape", r"shared\.weight is \[399, 32\], not \[400, 32\]"),
        ("cut", "cannot be read"),
        ("layers", "num_hidden_layers is 10000"),
        (
            "distance",
            r"config\.json: relative_attention_max_distance 16: 16 distances have a bucket each .*use 17 or more",
        ),
        ("family", r"a model of type 'bert': give one of T5's family \(t5, mt5\)"),
        ("start", "its decoder starts with token 3"),
        ("vocabulary", "its token .* is '<extra_id_3>', but '<extra_id_3333>' to the model"),
        ("no weights", "holds no weights"),
        ("no config", "holds no config.json"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_error(kind: str, message: str, pairs: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "t5", pairs / "tokenizer")
    damage(folder, kind)
    with pytest.raises(TrunklineError, match=message) as caught:
        make_task(toy_config(tmp_path, pairs, model={"path": str(folder)})).build_model()
    assert str(folder) in str(caught.value)
    shutil.rmtree(folder)


def test_a_bin_file_that_holds_more_than_tensors_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"shared.weight": torch.zeros(2), "path": Path("x")}, path)
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        load_weights(network_of(model_of()), path, "tied")


def test_a_bin_folder_with_every_name_of_the_embedding_is_written_with_every_name(pairs: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "t5", pairs / "tokenizer")
    state = load_file(folder / "model.safetensors")
    state |= dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", HEAD), state["shared.weight"])
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    task: Any = make_task(toy_config(tmp_path, pairs, model={"path": str(folder)}))
    network = task.build_model().eval()
    assert task.head == "tied"
    written = task.file_tensors({task.tensor_name(name): x for name, x in network.state_dict().items()})
    assert {name: x.shape for name, x in written.items()} == {name: x.shape for name, x in state.items()}
    torch.testing.assert_close(our_logits(network), their_logits(folder), rtol=1e-4, atol=1e-4)


def test_a_run_in_bf16_learns_and_its_final_folder_is_whole(pairs: Path, tmp_path: Path) -> None:
    config = toy_config(
        tmp_path, pairs, model={"tie_word_embeddings": False, "dropout": 0.1},
        training={"steps": 12, "eval_every": 12, "save_every": 12},
        deepspeed={"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}},
    )  # fmt: skip
    Trainer(make_task(config), config, start(), tmp_path / "run").run()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    assert losses[-1] < 0.9 * losses[0]
    final = tmp_path / "run/final"
    torch.testing.assert_close(
        our_logits(network_of(model_of(path=str(final)))), their_logits(final), rtol=1e-4, atol=1e-4
    )
