"""Model folders of other people's: nothing of theirs runs, what is wrong is one error, what they say is kept."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.causal_lm.families import saved, tiny_config
from tests.models.causal_lm.toy_language import toy_config
from trunkline.engine.errors import CheckpointError, TrunklineError
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.models.causal_lm.build import hf_config_of, make_network
from trunkline.models.causal_lm.config import CausalLMModel, Pretrain
from trunkline.models.causal_lm.trained import load_trained
from trunkline.models.registry import make_task
from trunkline.models.text.folder import tensor_shapes
from trunkline.models.text.tokenizer import load_tokenizer


def opened(folder: Path) -> Any:
    model = CausalLMModel(objective=Pretrain(type="pretrain"), path=str(folder))
    network = make_network(model, hf_config_of(model, 32))
    tensor_shapes(folder)
    return network


def edit(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folder") / "llama"
    saved(tiny_config("llama", vocab_size=512), folder)
    return folder


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


class Evil:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


def header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Put another header before the values of the folder's weights."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    found = json.loads(data[8 : 8 + size])
    changed = change(found)
    text = json.dumps(found if changed is None else changed).encode() if not isinstance(changed, bytes) else changed
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def first(entries: dict[str, Any]) -> dict[str, Any]:
    return entries[next(name for name in entries if name != "__metadata__")]


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no JSON": lambda found: b"{",
    "a list": lambda found: [1],
    "deep": lambda found: b"[" * 100_000,
    "not UTF-8": lambda found: b'{"\xff": 1}',
    "a shape that is larger": lambda found: first(found).update(shape=[10**6, 10**6]),
    "a negative shape": lambda found: first(found).update(shape=[-1, 2]),
    "a shape that overflows": lambda found: first(found).update(shape=[2**63, 2**63]),
    "another dtype": lambda found: first(found).update(dtype="F64"),
    "an unknown dtype": lambda found: first(found).update(dtype="X9"),
    "offsets past the end": lambda found: first(found).update(data_offsets=[0, 10**12]),
    "offsets backwards": lambda found: first(found).update(data_offsets=[10, 0]),
    "a tensor without offsets": lambda found: first(found).pop("data_offsets") and None,
    "metadata that is no text": lambda found: found.update(__metadata__={"a": 1}),
    "a tensor too few": lambda found: found.pop("model.norm.weight") and None,
}


@pytest.mark.parametrize("name", HEADERS)
def test_hostile_headers_are_one_error(name: str, copy: Path) -> None:
    header(copy, HEADERS[name])
    with pytest.raises(CheckpointError, match=r"model\.path: .*/model(/model\.safetensors)?:") as caught:
        opened(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_cut_files_of_weights_are_named(size: int, copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=r"model\.path: .*/model.*:"):
        opened(copy)
    with pytest.raises(CheckpointError, match=r"model/model\.safetensors: cannot be read"):
        tensor_shapes(copy)


CONFIGS: dict[str, dict[str, Any]] = {
    "a width that is text": {"hidden_size": "32"},
    "no heads": {"num_attention_heads": 0},
    "negative heads": {"num_attention_heads": -2},
    "a width that does not divide": {"hidden_size": 33},
    "no width": {"hidden_size": None},
    "an unknown activation": {"hidden_act": "no_such_thing"},
    "an unknown rope": {"rope_parameters": {"rope_type": "no_such_thing"}},
    "another family": {"model_type": "bert"},
    "an unknown family": {"model_type": "no_such_thing"},
    "a family that is a list": {"model_type": ["llama"]},
    "layers that are a list": {"num_hidden_layers": [2]},
    "another number of layers": {"num_hidden_layers": 3},
    "another width of the middle": {"intermediate_size": 47},
    "more layers than memory": {"num_hidden_layers": 10**9},
    "a vocabulary that is too large": {"vocab_size": 10**9},
    "a middle that is too wide": {"intermediate_size": 10**9},
    "architectures that are no names": {"architectures": 5},
    "a tuple in place of outputs": {"return_dict": False},
    "a code map that is a list": {"auto_map": [1], "model_type": "none"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_cannot_be_are_one_error(name: str, copy: Path) -> None:
    edit(copy / "config.json", **CONFIGS[name])
    if name == "architectures that are no names":  # transformers ignores them
        opened(copy)
        return
    with pytest.raises(TrunklineError, match=re.escape(str(copy))) as caught:
        opened(copy)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_configuration_are_one_error(copy: Path) -> None:
    path = copy / "config.json"
    for content in (b"", b"{", b"[]", b"\xff\xfe", b'{"a":' * 100_000, b"null", b'"llama"'):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.path: .*config\.json"):
            opened(copy)


def test_weights_that_do_not_fit_are_listed(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"do not fit .*: model.*up_proj\.weight is \[47, 32\], not \[48, "):
        opened(copy)
    del tensors[name], tensors["model.norm.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"do not fit .*: model.*up_proj\.weight, model\.norm\.weight"):
        opened(copy)


def test_experts_that_are_missing_are_an_error(tmp_path: Path) -> None:
    saved(tiny_config("mixtral"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[next(name for name in tensors if "experts.1.w1" in name)]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"model.path: {tmp_path}: "):
        opened(tmp_path)


@pytest.mark.parametrize(
    "entries",
    [{}, [], {"a": 1}, {"a": "../model.safetensors"}, {"a": "/etc/passwd"}, {"a": "absent.safetensors"}, {"a": None}],
)
def test_indices_that_lead_elsewhere_are_errors(entries: Any, copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "other.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": entries}))
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map (must name|names)"):
        opened(copy)


def test_pickles_do_not_run(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").unlink()
    for content in (pickle.dumps(Evil(tmp_path / "ran")), b"", b"\x80", b"PK\x03\x04"):
        (copy / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model/pytorch_model\.bin: damaged, or holds more than tensors"):
            opened(copy)
    torch.save({"a": Evil(tmp_path / "ran")}, copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model/pytorch_model\.bin: damaged, or holds more than tensors"):
        opened(copy)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_without_code_are_read(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    assert tensor_shapes(copy) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    opened(copy)


def test_no_code_of_a_folder_runs_whatever_is_answered(
    llama: Path, stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks, folders = tmp_path / "ran", []
    for name, model_type, mapped in (
        ("known", "llama", ("AutoConfig", "AutoModelForCausalLM")),
        ("unknown", "of-their-own", ("AutoConfig", "AutoModelForCausalLM")),
        ("not a language model", "clip_vision_model", ("AutoModelForCausalLM",)),
    ):
        folder = Path(shutil.copytree(llama, tmp_path / name))
        shutil.copytree(stores / "text/tokenizer", folder, dirs_exist_ok=True)
        code = f"import os\nos.makedirs({str(marks)!r}, exist_ok=True)\nclass X: pass\n"
        (folder / "custom_generate").mkdir()
        for path in ("code.py", "custom_generate/generate.py", "__init__.py"):
            (folder / path).write_text(code)
        edit(folder / "config.json", model_type=model_type, auto_map=dict.fromkeys(mapped, "code.X"))
        edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.X", "code.X"]})
        if name == "unknown":
            edit(folder / "tokenizer_config.json", tokenizer_class="X")
        folders.append(folder)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    found = []
    for folder in folders:
        for what in (opened, load_tokenizer):
            try:
                found.append(type(getattr(what(folder), "lm", None)).__name__)
            except TrunklineError as error:
                found.append(str(error))
    assert found[0] == "LlamaForCausalLM"
    assert "auto_map: the model runs code of its folder, which is never done here" in found[2]
    assert "cannot be read" in found[4]
    assert sys.stdin.read() == "y\n" * 100, "nothing was asked"
    assert not marks.exists()


def test_what_is_written_does_not_ask_for_code(llama: Path, stores: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "code.X"})
    task = make_task(toy_config(tmp_path, stores, model={"path": str(folder)}))
    assert "auto_map" not in task.save_assets(tmp_path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config: its weights are"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config: its weights are"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "quantization_config: its weights are"),
        ({"compression_config": {"a": 1}}, "compression_config: its weights are compressed"),
        ({"transformers_weights": "../other.safetensors"}, "transformers_weights: it names another file"),
    ],
)
def test_quantized_folders_and_others_that_cannot_be_trained_are_refused(
    keys: dict[str, Any], message: str, copy: Path
) -> None:
    edit(copy / "config.json", **keys)
    with pytest.raises(CheckpointError, match=rf"model/config\.json: {message}"):
        opened(copy)


def test_adapters_are_refused(copy: Path) -> None:
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds an adapter \(adapter_config\.json\).*merge it"):
        opened(copy)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "jetmoe", "granitemoe"])
def test_the_router_s_auxiliary_loss_is_refused_by_name(family: str, tmp_path: Path) -> None:
    experts = {"num_experts": 4} if family == "qwen3_moe" else {}
    saved(tiny_config(family, **experts), tmp_path)
    opened(tmp_path)
    edit(tmp_path / "config.json", output_router_logits=True)
    with pytest.raises(CheckpointError, match=r"config\.json: output_router_logits: .*auxiliary loss.*set it to false"):
        opened(tmp_path)


def test_generation_settings_of_the_start_are_kept_with_all_its_stops(
    pretrained: Path, stores: Path, tmp_path: Path
) -> None:
    from transformers import GenerationConfig

    base = Path(shutil.copytree(pretrained / "best", tmp_path / "base"))
    (base / "digests.json").unlink()  # its files are changed
    settings = {"eos_token_id": [7, 9, 5], "temperature": 0.6, "top_p": 0.9, "do_sample": True, "pad_token_id": 11}
    (base / "generation_config.json").write_text(json.dumps(settings | {"of_their_own": {"a": 1}}))
    config = toy_config(
        tmp_path, stores, model={"path": str(base)}, training={"steps": 1, "eval_every": 1, "save_every": 1}
    )
    task: Any = make_task(config)
    Trainer(task, config, start(), tmp_path / "run").run()
    eos = [7, 9, 5, *(token for token in _stops(task) if token not in (7, 9, 5))]
    for folder in (tmp_path / "run/best", tmp_path / "run/final"):
        found = json.loads((folder / "generation_config.json").read_text())
        assert found == settings | {"of_their_own": {"a": 1}, "eos_token_id": eos}
        assert GenerationConfig.from_pretrained(folder).eos_token_id == eos
    assert load_trained(tmp_path / "run", torch.device("cpu")).stops == sorted(eos)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": "two"}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id must be a token's number"):
        make_task(config)


def _stops(task: Any) -> list[int]:
    from trunkline.models.causal_lm.tokenizer import stop_ids

    return stop_ids(task.tokenizer)


@pytest.mark.parametrize("written", [True, False])
def test_stops_of_config_json_are_kept_where_they_are_marks(
    written: bool, pretrained: Path, stores: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(pretrained / "best", tmp_path / "base"))
    (base / "digests.json").unlink()  # its files are changed
    (base / "generation_config.json").unlink()
    task: Any = make_task(toy_config(tmp_path, stores, model={"path": str(base)}))
    eos, mark = task.tokenizer.eos_token_id, task.tokenizer.convert_tokens_to_ids("<|im_start|>")
    edit(base / "config.json", eos_token_id=[mark, eos] if written else 300)  # 300 is a piece of a word
    task = make_task(toy_config(tmp_path, stores, model={"path": str(base)}))
    config = task.save_assets(tmp_path / "out")
    assert config["eos_token_id"] == ([mark, eos] if written else eos)
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["eos_token_id"] == list(dict.fromkeys([*([mark, eos] if written else []), *_stops(task)]))
