"""Weights come out under the names and in the shapes in which they came in, for any family, and from a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.causal_lm.families import saved, tiny_config
from tests.models.causal_lm.toy_language import toy_config
from trunkline.engine.errors import CheckpointError
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.launchers.export import main as export
from trunkline.models.registry import make_task
from trunkline.models.text.file_format import FileFormat, shell_of
from trunkline.models.text.folder import read_config


def gemma3(vocab_size: int = 97) -> Any:
    """A text model within one that sees pictures."""
    from transformers import Gemma3Config

    text = tiny_config("gemma3_text", vocab_size=vocab_size, sliding_window=64).to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)


def qwen3_5(folder: Path) -> None:
    """A text model that transformers opens alone, out of one that sees pictures and drafts further tokens."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32}
    text = tiny_config("qwen3_5_text").to_dict()
    config = Qwen3_5Config(text_config=text, vision_config=vision | {"patch_size": 4})
    torch.manual_seed(0)
    Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)
    further = {"mtp.norm.weight": torch.randn(4).to(torch.bfloat16)}
    save_file(tensors_of(folder) | further, folder / "model.safetensors", {"format": "pt"})


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def as_written(folder: Path) -> dict[str, Tensor]:
    """What a network that was loaded from the folder is turned into."""
    from transformers import AutoModelForCausalLM

    config = read_config(folder)
    lm = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    written = FileFormat(shell_of(config, "AutoModelForCausalLM"), folder)
    once = dict(lm.named_parameters()) | dict(lm.named_buffers())
    held = lm.state_dict()
    return written({name: value.detach() for name, value in once.items() if name in held})


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "jamba", "camembert", "qwen3"])
def test_a_network_is_turned_back_into_the_folder_s_tensors(family: str, tmp_path: Path) -> None:
    experts = {"num_experts": 4} if family == "qwen3_moe" else {}
    saved(tiny_config(family, **experts), tmp_path)
    equal(as_written(tmp_path), tensors_of(tmp_path))


def test_a_model_with_pictures_keeps_either_kind_of_prefixes(tmp_path: Path) -> None:
    saved(gemma3(), tmp_path)
    inner = tensors_of(tmp_path)
    assert {name.split(".")[0] for name in inner} == {"language_model", "multi_modal_projector", "vision_tower"}
    equal(as_written(tmp_path), inner)
    outer = {f"model.{name.replace('language_model.model.', 'language_model.')}": inner[name] for name in inner}
    save_file(outer, tmp_path / "model.safetensors", {"format": "pt"})
    equal(as_written(tmp_path), outer)


def test_what_the_network_does_not_have_is_kept_as_it_is(tmp_path: Path) -> None:
    qwen3_5(tmp_path)
    wanted = tensors_of(tmp_path)
    equal(as_written(tmp_path), wanted)
    shell = shell_of(read_config(tmp_path), "AutoModelForCausalLM")
    beside = FileFormat(shell, tmp_path).beside
    assert "mtp.norm.weight" in beside
    assert any("visual" in name for name in beside)
    assert not any("language_model" in name for name in beside)
    made = FileFormat(shell, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        made({name: torch.zeros_like(value, device="cpu") for name, value in shell.state_dict().items()})


def test_a_folder_without_the_models_prefix_and_one_that_holds_a_tied_tensor_twice(tmp_path: Path) -> None:
    saved(tiny_config("gpt2"), tmp_path / "gpt2")
    bare = {name.removeprefix("transformer."): value for name, value in tensors_of(tmp_path / "gpt2").items()}
    save_file(bare, tmp_path / "gpt2/model.safetensors", {"format": "pt"})
    equal(as_written(tmp_path / "gpt2"), bare)
    saved(tiny_config("llama", tie_word_embeddings=True), tmp_path / "llama")
    twice = tensors_of(tmp_path / "llama")
    twice["lm_head.weight"] = twice["model.embed_tokens.weight"].clone()
    save_file(twice, tmp_path / "llama/model.safetensors", {"format": "pt"})
    equal(as_written(tmp_path / "llama"), twice)


@pytest.mark.parametrize("family", ["mixtral", "gemma3", "llama"])
def test_a_run_writes_and_exports_the_folder_s_tensors(family: str, stores: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    saved(gemma3(512) if family == "gemma3" else tiny_config(family, vocab_size=512), base)
    if family == "llama":  # with what the network does not have
        beside = {"mtp.norm.weight": torch.randn(4, dtype=torch.bfloat16), "model.visual.proj.weight": torch.ones(3, 2)}
        save_file(tensors_of(base) | beside, base / "model.safetensors", {"format": "pt"})
    shutil.copytree(stores / "text/tokenizer", base, dirs_exist_ok=True)
    optimizer = {"type": "SGD", "params": {"lr": 0.0}}  # so that the values are the folder's too
    config = toy_config(
        tmp_path, stores, model={"path": str(base)}, training={"steps": 1, "eval_every": 1, "save_every": 1},
        deepspeed={"optimizer": optimizer, "scheduler": {"type": "WarmupCosine", "params": {"warmup": 0}}},
    )  # fmt: skip
    Trainer(make_task(config), config, start(), tmp_path / "run").run()
    wanted = tensors_of(base)
    assert export(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--max-shard-gib", "4e-5"]) == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    ids = torch.arange(4, 20)[None]
    expected = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(input_ids=ids).logits
    for folder in (tmp_path / "run/best", tmp_path / "run/final", tmp_path / "out"):
        equal(tensors_of(folder), wanted)
        lm = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(lm(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == wanted.keys()
