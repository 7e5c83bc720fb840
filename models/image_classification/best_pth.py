"""best.pth, the checkpoint of the FastAI-compatible trainer: written at each new best, read by --load_model.

    write(folder, state, classes, img_size, arch)    <folder>/best.pth and class_names.json beside it
    is_of(folder, best)                              whether it is there and of this evaluation; another is renamed
    read(path, model, classes, steps_per_epoch)      a WholeState in the names of `model`

    {"model": {"model.conv1.weight": ...}, "opt": optimizer.state_dict(), "epoch": 12, "loss": 0.31, "img_size": 224,
     "arch": "resnet34"}

`model` has torchvision's names of a ResNet, and transformers' of any other network. `opt` is what torch's optimizer has
over model.parameters(), in one group. `epoch` is the number of finished epochs. If the optimizer has counted as many
steps as one epoch more has, that one is taken as finished too: such a file names its last epoch, from 0 on.
FastAI's own files ("0.model." the body, "1." the head) give the body. Nothing that a file holds is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trunkline.engine.checkpoint.foreign import load_foreign, read_torch
from trunkline.engine.checkpoint.training_loops import finished_epochs, kept_by_optimizer, number, state_of
from trunkline.engine.config.strict import show
from trunkline.engine.errors import CheckpointError, ConfigError
from trunkline.engine.machine.files import replace_whole, unused, write_json
from trunkline.engine.machine.log import LOG
from trunkline.engine.machine.reading import read_whole, reason
from trunkline.engine.whole_state import WholeState
from trunkline.models.image_classification.architectures import ARCHITECTURES
from trunkline.models.image_classification.torchvision_names import (
    from_torchvision,
    in_torchvision_order,
    is_resnet_of_transformers,
    torchvision_names,
)

BEST_PTH, CLASS_NAMES = "best.pth", "class_names.json"
_PREFIX = "model."
_MOST_NAMES = 64 << 20  # bytes
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def write(folder: Path, state: WholeState, classes: tuple[str, ...], img_size: int, arch: str) -> None:
    """Put best.pth and class_names.json into the folder, each whole or not at all. Raises OSError."""
    names = torchvision_names([*state.parameters, *state.buffers])
    order = list(state.parameters)
    if names[order[0]] != order[0]:
        order.sort(key=lambda name: in_torchvision_order(names[name]))
    tensors = {f"{_PREFIX}{names[name]}": tensor for name, tensor in {**state.parameters, **state.buffers}.items()}
    kept = {place: dict(state.kept[name]) for place, name in enumerate(order) if state.kept.get(name)}
    content: dict[str, Any] = {
        "model": {key: tensors[key] for key in _as_in_a_state_dict(tensors, [_PREFIX + names[name] for name in order])},
        "epoch": state.step // state.steps_per_epoch,
        "loss": state.metrics["loss"],
        "img_size": img_size,
        "arch": arch,
    }
    if state.optimizer:  # not one that only DeepSpeed has
        content["opt"] = {"state": kept, "param_groups": [{**state.optimizer, "params": list(range(len(order)))}]}
    replace_whole(folder / BEST_PTH, lambda draft: torch.save(content, draft))
    write_json(folder / CLASS_NAMES, list(classes))


def is_of(folder: Path, best: WholeState | None) -> bool:
    """Whether best.pth is of the evaluation `best`. That of another one, or a damaged one, is renamed.

    Raises OSError.
    """
    path = folder / BEST_PTH
    if not path.exists():
        return False
    try:
        held = read_torch(path)
        epoch, loss = (number(held.get(key)) for key in ("epoch", "loss"))
    except (CheckpointError, AttributeError):
        epoch = loss = None
    if best is not None and epoch == best.step // best.steps_per_epoch and loss == best.metrics.get("loss", loss):
        return True
    label = "unknown" if epoch is None else f"{epoch:g}"
    path.rename(target := unused(folder / f"aside-best-epoch-{label}.pth"))
    LOG.info(f"note: {path} is not of the best weights of the run as it begins; renamed to {target.name}")
    return False


def _as_in_a_state_dict(tensors: Mapping[str, Tensor], parameters: list[str]) -> list[str]:
    """The keys, with the buffers of a module after its parameters."""
    keys = []
    for name in parameters:
        keys.append(name)
        if name.endswith(".bias"):
            beside = (f"{name.removesuffix('bias')}{each}" for each in _STATISTICS)
            keys += [key for key in beside if key in tensors]
    return [*keys, *(key for key in tensors if key not in keys)]


def read(
    path: Path, model: nn.Module, classes: Sequence[str], steps_per_epoch: int, img_size: int, arch: str | None
) -> WholeState:
    """The state in such a file. `model` is new, and holds the file's weights afterwards.

    Raises CheckpointError, also where class_names.json beside the file has other classes, and ConfigError where the
    file says that it is of another of the networks that are known by name.
    """
    _check_classes(path.with_name(CLASS_NAMES), classes)
    held = read_torch(path)
    if not isinstance(held, Mapping) or not isinstance(held.get("model"), Mapping):
        raise CheckpointError(
            f"{path}: holds no 'model' as best.pth does: is it weights alone? Use --pretrained {path}"
        )
    if (theirs := str(held.get("arch"))) != arch and {theirs, arch} <= ARCHITECTURES.keys():
        raise ConfigError(f"{path}: is of {theirs}, and this run trains {arch}: set model.arch (--arch) to {theirs}")
    is_resnet = is_resnet_of_transformers(model.state_dict())

    def called(name: str) -> str | None:
        name = name.removeprefix(_PREFIX)
        if is_resnet:
            return from_torchvision(name)
        return None if name.startswith("1.") else name.removeprefix("0.model.")

    names = [name for name in held["model"] if isinstance(name, str)]
    if all(re.match(r"[01]\.", name) for name in names):
        load_foreign(model, path, called, fresh=("classifier.*",))
        return state_of(model, 0, steps_per_epoch, notes=("is of FastAI: its body alone is taken, from epoch 0 on",))
    load_foreign(model, path, called)
    epoch, loss = (number(held.get(key)) for key in ("epoch", "loss"))
    ours = {name for name, _ in model.named_parameters()}
    kept, notes = kept_by_optimizer(
        held.get("opt"), [str(called(name)) for name in names if called(name) in ours], "opt"
    )
    finished, said = finished_epochs(epoch, kept, steps_per_epoch)
    notes = (*notes, *said)
    metrics = {} if loss is None else {"loss": loss}
    if metrics and held.get("img_size") not in (None, img_size):
        metrics = {}
        notes = (
            *notes,
            f"is of images of {show(held['img_size'])} pixels, here {img_size}: its loss is not the value to beat",
        )
    return state_of(model, finished * steps_per_epoch, steps_per_epoch, kept, metrics, notes)


def _check_classes(path: Path, classes: Sequence[str]) -> None:
    if path.is_file():
        try:
            found = json.loads(read_whole(path, _MOST_NAMES))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read ({reason(error)}): restore or remove it") from error
        if found != list(classes):
            raise CheckpointError(
                f"{path}: has the classes {show(found)}, and the data has {show(list(classes))}: weights of other "
                "classes are for --pretrained"
            )
