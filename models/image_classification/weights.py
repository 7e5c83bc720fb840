"""Weights that a network begins with: a Hugging Face folder's, torchvision's, timm's, or those of an earlier run.

    load_folder(network, folder)        those of `model.path`
    load_pretrained(network, path)      those of `model.pretrained`, under any of the names that it knows
    file_names(network)                 what files call the network's tensors

Each returns a line for whoever starts the run. A head for another number of classes stays as it was drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trunkline.engine.checkpoint.digests import check_digests
from trunkline.engine.checkpoint.foreign import load_foreign
from trunkline.engine.checkpoint.weights import is_finite
from trunkline.engine.errors import CheckpointError, TrunklineError
from trunkline.engine.machine.reading import check_regular, read_object
from trunkline.models.image_classification.torchvision_names import from_torchvision
from trunkline.models.text.folder import no_floats

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SHOWN = 3


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turn whatever is raised within into a CheckpointError that names the folder."""
    try:
        yield
    except TrunklineError:
        raise
    except Exception as error:  # transformers, torch and safetensors raise almost anything for a damaged file
        raise CheckpointError(f"model.path: {folder}: cannot be read: {brief(error)}") from error


def brief(error: BaseException) -> str:
    """What an error says, on one line of bounded length."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:300]}" if said else type(error).__name__


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a Hugging Face folder, whose code is never run. Raises CheckpointError."""
    from transformers import AutoConfig

    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"model.path: {folder} holds no config.json; give the folder of an image classifier")
    check_digests(folder)
    with reading(folder):
        check_regular(folder)
        raw = read_object(path, finite=False)
        if raw.get("quantization_config"):
            raise CheckpointError(
                f"model.path: {path}: quantization_config: training needs whole weights: give the folder of the model "
                "that was quantized"
            )
        if "model_type" not in raw:
            raise CheckpointError(
                f"model.path: {path}: names no model_type, so no class of transformers' reads it; for a run of "
                "model.normalization = group set model.arch, and model.pretrained to this folder"
            )
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if hasattr(config, "auto_map"):
            del config.auto_map  # it is written beside weights of transformers' own class
        return config


def load_folder(network: Any, folder: Path, head: Sequence[str]) -> str:
    """Put the folder's weights into the network. Raises CheckpointError if they do not fit.

    head: the names of tensors that may be missing there, or of another shape
    """
    from transformers import AutoModelForImageClassification
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # every rank would draw one
    with reading(folder):
        loaded, found = AutoModelForImageClassification.from_pretrained(
            folder, config=network.config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True,
            local_files_only=True, trust_remote_code=False, weights_only=True,
        )  # fmt: skip
    mismatched = {name: (list(theirs), list(ours)) for name, theirs, ours in found["mismatched_keys"]}
    absent = sorted({*found["missing_keys"], *mismatched} - set(head))
    if absent:
        shown = [f"{name} is {mismatched[name][0]}, not {mismatched[name][1]}" if name in mismatched else name
                 for name in absent[:_SHOWN]]  # fmt: skip
        raise CheckpointError(
            f"model.path: {folder}: its weights do not fit its config.json; missing or of another shape: "
            f"{', '.join(shown)}{f' and {len(absent) - _SHOWN} more' if absent[_SHOWN:] else ''}"
        )
    fresh = {*found["missing_keys"], *mismatched} & set(head)
    state = {name: tensor for name, tensor in loaded.state_dict().items() if name not in fresh}
    broken = [name for name, tensor in state.items() if not is_finite(tensor)]
    # by their last part, since the files may have other names: a batch norm's counter is a whole number there, too
    floats = {name.rpartition(".")[2] for name, tensor in state.items() if tensor.is_floating_point()}
    unused = fresh | set(found["unexpected_keys"])
    broken += sorted(name for name in no_floats(folder) - unused if name.rpartition(".")[2] in floats)
    if broken:
        raise CheckpointError(
            f"model.path: {folder}: holds no finite floating-point numbers in {', '.join(broken[:_SHOWN])}"
            f"{f' and {len(broken) - _SHOWN} more' if broken[_SHOWN:] else ''}: give weights that work"
        )
    network.load_state_dict(state, strict=False)
    if not fresh:
        return f"{folder}: weights of {type(loaded).__name__}, with its head"
    why = f"that of the folder is for {min(mismatched.values())[0][0]}" if mismatched else "the folder has none"
    classes = network.config.num_labels
    return f"{folder}: weights of {type(loaded).__name__}; the head for {classes} classes is new, since {why}"


def load_pretrained(network: Any, path: Path, head: Sequence[str]) -> str:
    """Put the weights of a file or a folder into the network. Raises CheckpointError if they do not fit.

    It knows the names that the network's own files have, and for ResNets torchvision's, which are timm's, and what the
    FastAI library makes of them, whose head is left out.
    """
    own = {file_name: name for name, file_name in file_names(network).items()}
    is_resnet = network.config.model_type == "resnet"

    def renamed(name: str) -> str | None:
        return own.get(name) or (from_torchvision(name) if is_resnet else name)

    try:
        return load_foreign(network, path, renamed, fresh=head)
    except CheckpointError as error:
        raise CheckpointError(f"model.pretrained: {error}") from error


def file_names(network: Any) -> dict[str, str]:
    """What files call the network's tensors, by its own names: transformers renames some that it reads."""
    from transformers.core_model_loading import revert_weight_conversion

    state = network.state_dict()
    renamed = {id(tensor): file_name for file_name, tensor in revert_weight_conversion(network, dict(state)).items()}
    return {name: renamed[id(tensor)] for name, tensor in state.items()}
