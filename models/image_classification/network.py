"""The networks: transformers' image classifiers, by name or as a folder describes them.

network = make_network(model, num_classes, img_size)          drawn anew
begin_with(network, model)                                    the weights that `model` says it begins with
network = trained_network(folder, model, num_classes, img_size)     that of a run, with its weights
network(pixel_values=x).logits       [B, num_classes] of x, [B, 3, S, S] of any floating dtype

hf_files(folder, network, ...)       what transformers reads beside the weights
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trunkline.engine.checkpoint.foreign import load_foreign
from trunkline.engine.errors import ConfigError, TrunklineError
from trunkline.engine.machine.files import write_json
from trunkline.models.image_classification.architectures import ARCHITECTURES
from trunkline.models.image_classification.config import ImageData, ImageModel
from trunkline.models.image_classification.normalization import batch_norms, normalized
from trunkline.models.image_classification.weights import (
    brief,
    file_names,
    load_folder,
    load_pretrained,
    read_config,
    reading,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_BLOCKS = {"resnet": ["ResNetBasicLayer", "ResNetBottleNeckLayer"], "convnext": ["ConvNextLayer"], "vit": ["ViTLayer"]}
"""The repeated blocks, where transformers names parts of them, or a stage beside its layers."""


def make_network(model: ImageModel, num_classes: int, img_size: int, folder: Path | None = None) -> nn.Module:
    """A new network, initialised from torch's global generator; on the device "meta" one without values.

    folder: what is asked for its config.json instead of `model.path`
    Raises ConfigError, and CheckpointError for a folder that cannot be read.
    """
    folder = folder or (Path(model.path) if model.path else None)
    config = read_config(folder) if model.path and folder else _new_config(model, img_size)
    config.num_labels = num_classes
    network: Any = _built(config, folder)
    if not batch_norms(network):
        _check_idle(model, type(network).__name__)
    normalized(network, model)
    network._no_split_modules = _BLOCKS.get(config.model_type, network._no_split_modules)
    network.register_forward_pre_hook(_suited, with_kwargs=True)
    return network


def begin_with(network: nn.Module, model: ImageModel) -> list[str]:
    """Put the weights that `model` names into a new network. Returns what was done, for whoever starts the run.

    Raises CheckpointError for weights that cannot be read or do not fit.
    """
    if model.path is not None:
        return [load_folder(network, Path(model.path), head_names(network))]
    if model.pretrained is not None:
        return [load_pretrained(network, Path(model.pretrained), head_names(network))]
    return []


def trained_network(folder: Path, model: ImageModel, num_classes: int, img_size: int) -> nn.Module:
    """The network of a run with the weights of `folder`, such as its best/, which alone is read.

    Raises CheckpointError or ConfigError.
    """
    network = make_network(model, num_classes, img_size, folder)
    load_foreign(network, folder, {file: name for name, file in file_names(network).items()})
    return network


def head_names(network: Any) -> list[str]:
    """The tensors whose shape the number of classes decides."""
    config = type(network.config).from_dict(network.config.to_dict())
    config.num_labels += 1
    with torch.device("meta"):
        other = _built(config, None).state_dict()
    return [
        name for name, tensor in network.state_dict().items() if name in other and other[name].shape != tensor.shape
    ]


def check_size(network: Any, img_size: int, model: ImageModel) -> None:
    """Raise ConfigError for a network, on the device "meta", that does not take images of this size."""
    try:
        network.eval()(pixel_values=torch.empty(1, 3, img_size, img_size, device="meta"))
    except TrunklineError:
        raise
    except Exception as error:  # each class of transformers' has its own
        raise ConfigError(
            f"data.img_size: {img_size}: {model.path or model.arch} cannot see images of that size: {brief(error)}"
        ) from error


def hf_files(
    folder: Path, network: Any, data: ImageData, short_side: int | None, classes: Sequence[str], is_plain: bool
) -> dict[str, Any]:
    """Write preprocessor_config.json, by which transformers prepares images. Returns what its config.json holds.

    short_side: None where validation sees whole images resized to a square, else it sees their central square
    is_plain: whether transformers' own class computes what the network computes; else no class is named
    """
    square = {"height": data.img_size, "width": data.img_size}
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "ViTImageProcessor" if short_side is None else "CLIPImageProcessor",
            "do_convert_rgb": True, "do_resize": True, "resample": 2,
            **({"size": square} if short_side is None else
               {"size": {"shortest_edge": data.img_size}, "do_center_crop": True, "crop_size": square}),
            "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": list(data.mean), "image_std": list(data.std),
        },
    )  # fmt: skip
    config = json.loads(json.dumps(network.config.to_dict(), default=str))
    config |= {
        "architectures": [type(network).__name__],
        "id2label": {str(place): name for place, name in enumerate(classes)},
        "label2id": {name: place for place, name in enumerate(classes)},
    }
    left_out = {"_name_or_path"} if is_plain else {"_name_or_path", "architectures", "model_type"}
    return {key: value for key, value in config.items() if key not in left_out}


def _new_config(model: ImageModel, img_size: int) -> PreTrainedConfig:
    from transformers import AutoConfig

    assert model.arch is not None
    kind = ARCHITECTURES[model.arch]
    config = AutoConfig.for_model(kind.model_type, **kind.settings)
    if hasattr(config, "image_size"):
        config.image_size = img_size
    return config


def _built(config: PreTrainedConfig, folder: Path | None) -> Any:
    from transformers import AutoModelForImageClassification

    def build() -> Any:
        return AutoModelForImageClassification.from_config(config, dtype=torch.float32, trust_remote_code=False)

    if folder is None:
        return build()
    with reading(folder):
        return build()


def _check_idle(model: ImageModel, name: str) -> None:
    for key in ("normalization", "batch_norm_group"):
        if (value := getattr(model, key)) != (default := type(model).model_fields[key].default):
            raise ConfigError(
                f"model.{key}: {value} has no effect on {name}, which has no BatchNorm: remove it, or set it to "
                f"{default}"
            )


def _suited(
    network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Images in the dtype of the weights, which a backend may have narrowed, and laid out as convolutions are fast."""
    images: Tensor = kwargs["pixel_values"].to(next(network.parameters()).dtype)
    layout = torch.channels_last if images.is_cuda else torch.contiguous_format
    return args, kwargs | {"pixel_values": images.contiguous(memory_format=layout)}
