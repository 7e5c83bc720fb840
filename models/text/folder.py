"""A Hugging Face model folder that other people made.

None of its code runs. Whatever is wrong with it is one error.

    read_config(folder)        config.json as transformers' configuration
    tensor_shapes(folder)      the tensors in its files of weights, by name, from their headers alone
    no_floats(folder)          those that hold no floating-point numbers
    read_tensors(folder, ..)   some of them, with their values
    read_generation(folder)    generation_config.json as it is, or nothing
    reading(folder)            what transformers raises within becomes a CheckpointError that names the folder
    started_from(path, key)    what a run began with, or None where it is gone

Pickled weights (.bin) are read without running what they hold.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from trunkline.engine.checkpoint.weights import is_plain
from trunkline.engine.errors import CheckpointError, TrunklineError
from trunkline.engine.machine.reading import check_regular, read_object

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_MAX_JSON_BYTES = 64 << 20  # an index of the largest models has some tens of MiB
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where weights are, in the order in which transformers looks for them."""

_REFUSED = {
    "quantization_config": "its weights are quantized, and training needs whole ones: give the folder of the model "
    "that was quantized, or one that was saved after `model.dequantize()`",
    "compression_config": "its weights are compressed, and training needs whole ones: give the model's own folder",
    "fusion_config": "it replaces parts of the network when it is loaded: remove the key",
    "transformers_weights": "it names another file of weights: call that file model.safetensors, and remove the key",
}
"""Keys of config.json that ask for what is not done here, and what to do about them."""


@contextmanager
def reading(folder: Path, file: str = "") -> Iterator[None]:
    """Turn whatever is raised within into a CheckpointError that names the folder, or the file in it."""
    try:
        yield
    except TrunklineError:
        raise
    except Exception as error:  # transformers, torch, safetensors and pydantic raise almost anything for a damaged file
        raise CheckpointError(f"model.path: {folder / file}: cannot be read: {brief(error)}") from error


def brief(error: BaseException) -> str:
    """What an error says, on one line of bounded length."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:400]}" if said else type(error).__name__


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of the model in `folder`. Raises CheckpointError.

    A folder that brings code is opened with transformers' own class of that model_type, or not at all.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"model.path: {folder} holds no config.json; give the folder of a Hugging Face model")
    with reading(folder):
        check_regular(folder)
    raw = _read_json(path)
    for section in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        for key, remedy in _REFUSED.items():
            if section.get(key):
                raise CheckpointError(f"model.path: {path}: {key}: {remedy}")
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"model.path: {folder}: holds an adapter (adapter_config.json), which is not trained here: merge it into "
            "the model and give the merged folder"
        )
    if "auto_map" in raw and raw.get("model_type") not in CONFIG_MAPPING:
        raise CheckpointError(
            f"model.path: {path}: auto_map: the model runs code of its folder, which is never done here, and "
            f"transformers has no model_type {raw.get('model_type')!r} of its own: give a model that it knows"
        )
    with reading(folder, "config.json"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if hasattr(config, "auto_map"):
            del config.auto_map  # it is written beside the weights of transformers' own class
        text = config.get_text_config()
        if getattr(text, "output_router_logits", False) and getattr(text, "router_aux_loss_coef", 1) != 0:
            raise CheckpointError(
                f"model.path: {path}: output_router_logits: it adds the router's auxiliary loss, a product of means "
                "over a batch, which would depend on how the batch is split over ranks and micro-batches: set it to "
                "false; the router then learns from the tokens alone"
            )
        return config


def read_generation(folder: Path) -> dict[str, Any]:
    """The folder's generation_config.json; empty if there is none. Raises CheckpointError."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    generation = _read_json(path)
    token_ids(generation.get("eos_token_id"), f"{path}: eos_token_id")
    return generation


def token_ids(value: Any, what: str) -> list[int]:
    """The tokens of an entry that is one, several or none. Raises CheckpointError."""
    tokens = [] if value is None else value if isinstance(value, list) else [value]
    if any(not isinstance(token, int) or isinstance(token, bool) or token < 0 for token in tokens):
        raise CheckpointError(f"model.path: {what} must be a token's number or a list of them; found {str(value)[:80]}")
    return tokens


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in the folder's files of weights. No values are read. Raises CheckpointError."""
    return {name: shape for name, (shape, _) in _headers(folder).items()}


def no_floats(folder: Path) -> set[str]:
    """Those tensors that do not hold a floating-point number for each element. Raises CheckpointError."""
    return {name for name, (_, is_float) in _headers(folder).items() if not is_float}


def _headers(folder: Path) -> dict[str, tuple[tuple[int, ...], bool]]:
    found: dict[str, tuple[tuple[int, ...], bool]] = {}
    for path in _files(folder):
        with reading(folder, path.name):
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                    found |= {
                        name: (tuple(part.get_shape()), part.get_dtype().startswith(("F", "BF")))
                        for name, part in parts.items()
                    }
            else:
                state = _unpickled(path)
                found |= {name: (tuple(tensor.shape), is_plain(tensor)) for name, tensor in state.items()}
    return found


def read_tensors(folder: Path, names: list[str]) -> dict[str, torch.Tensor]:
    """These tensors of the folder's files, as they are. Raises CheckpointError."""
    found: dict[str, torch.Tensor] = {}
    for path in _files(folder):
        with reading(folder, path.name):
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    found |= {name: file.get_tensor(name) for name in names if name in file.keys()}  # noqa: SIM118
            else:
                state = _unpickled(path, "cpu")
                found |= {name: state[name].clone() for name in names if name in state}
    if missing := [name for name in names if name not in found]:
        raise CheckpointError(f"model.path: {folder}: has lost {missing[0]} since the run began: put its files back")
    return found


def _unpickled(path: Path, device: str = "meta") -> dict[str, torch.Tensor]:
    """A file's tensors, by default without values. Raises CheckpointError for whatever else the file holds."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise TypeError(type(state))
    except Exception as error:  # torch's own words say how to let it run
        raise CheckpointError(
            f"model.path: {path}: damaged, or holds more than tensors, which would run as code: give a folder with "
            "model.safetensors"
        ) from error
    return state


def _files(folder: Path) -> list[Path]:
    """The file of weights, or those that the index names."""
    place = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if place is None:
        raise CheckpointError(f"model.path: {folder}: holds no weights ({', '.join(_WEIGHTS)})")
    if place.suffix != ".json":
        return [place]
    entries = _read_json(place).get("weight_map")
    names = list(entries.values()) if isinstance(entries, dict) else []
    suffix = place.name.split(".")[1]
    if not names or any(not isinstance(name, str) or name != Path(name).name for name in names):
        raise CheckpointError(
            f"model.path: {place}: weight_map must name files of this folder; found {str(entries)[:80]}"
        )
    files = [folder / name for name in sorted(set(names))]
    if missing := [path.name for path in files if path.suffix != f".{suffix}" or not path.is_file()]:
        raise CheckpointError(f"model.path: {place}: weight_map names {missing[0]}, which is no .{suffix} file here")
    return files


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; unlike our own files it may hold Infinity, as transformers writes it. Raises CheckpointError."""
    with reading(path.parent, path.name):
        return read_object(path, _MAX_JSON_BYTES, finite=False)


def started_from(path: str | None, key: str = "model.path") -> Path | None:
    """What a run began with, to be compared with. None for nothing, and where it is gone, which is printed."""
    if path is None or os.path.exists(path):  # False for what cannot be looked at, where Path.exists() raises
        return None if path is None else Path(path)
    print(f"{key}: {path} is not there any more: what the model started from is left out", file=sys.stderr)
    return None
