"""Weights that travel: best/ and final/ with model.safetensors, config.json and the task's assets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trunkline.engine.backends import Backend
from trunkline.engine.checkpoint.digests import check_digests, replace_files
from trunkline.engine.config.run_config import RunConfig
from trunkline.engine.config.strict import read_json_object, show
from trunkline.engine.errors import CheckpointError
from trunkline.engine.machine.files import save_tensors, write_json
from trunkline.engine.machine.reading import open_regular, read_object, reason
from trunkline.engine.ranks.distributed import Ranks, from_main, on_main
from trunkline.engine.task import Task

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Beside weights in several files: which file holds which tensor, as Hugging Face writes it."""


FINGERPRINT = "data_fingerprint"
"""In config.json beside weights: which content the data set had that they were trained on."""


def save_weights(
    folder: Path, backend: Backend, task: Task, config: RunConfig, facts: dict[str, float], ranks: Ranks
) -> str:
    """Write the model's whole weights; returns the SHA-256 of their file. Called on all ranks.

    The folder is whole at any moment: see trunkline.engine.checkpoint.digests.

    Raises:
        CheckpointError: on all ranks, if a file could not be written.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in backend.full_state():
        called = task.tensor_name(name)
        if ranks.is_main and called is not None:
            tensors[called] = tensor

    written: dict[str, dict[str, Any]] = {}

    def write(draft: Path) -> None:
        write_assets(draft, task, config)
        found = {name: tensor.contiguous() for name, tensor in task.file_tensors(tensors).items()}
        save_tensors(found, draft / WEIGHTS, metadata_of(facts))

    on_main(lambda: written.update(replace_files(folder, write)), ranks, f"{folder}: cannot write these weights")
    return from_main(written[WEIGHTS]["sha256"] if ranks.is_main else "", ranks)


def metadata_of(facts: Mapping[str, float]) -> dict[str, str]:
    """What a file of weights says of itself."""
    return {"format": "pt"} | {key: repr(value) for key, value in facts.items()}


def saved_facts(folder: Path) -> dict[str, float]:
    """What was noted with `folder`'s weights (step, metric), which are not loaded; nothing if that cannot be read."""
    try:
        with open_regular(folder / WEIGHTS), safe_open(folder / WEIGHTS, framework="pt") as file:
            return _facts(file.metadata())
    except (OSError, SafetensorError, ValueError):
        return {}


def _facts(metadata: Mapping[str, str] | None) -> dict[str, float]:
    return {key: float(value) for key, value in sorted((metadata or {}).items()) if key != "format"}


def find_weights(run: Path) -> Path:
    """The folder with a run's weights: best/, else final/, else `run` itself.

    Raises CheckpointError if there is none, or if a file in it is not the one that was written.
    """
    for folder in (run / "best", run / "final", run):
        if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
            check_digests(folder)
            return folder
    raise CheckpointError(
        f"{run}: no {WEIGHTS} here, nor in best/ or final/ of it: give the folder of a run that has evaluated or ended"
    )


def described(folder: Path) -> str:
    """One line for whoever uses `folder`'s weights: which they are."""
    facts = ", ".join(f"{key} {value:.6g}" for key, value in saved_facts(folder).items())
    return f"weights: {folder}{f' ({facts})' if facts else ''}"


def write_assets(folder: Path, task: Task, config: RunConfig, dtype: str = "float32") -> None:
    """Write what stands beside weights of `dtype`: the task's assets, and config.json, for this and other programs."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {"dtype": dtype, FINGERPRINT: task.fingerprint()}
    write_json(folder / "config.json", task.save_assets(folder) | own | config.as_dict())


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a run or beside weights, where transformers may have put Infinity. Raises CheckpointError."""
    try:
        return read_object(path, finite=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({reason(error)}): restore it, or name another folder"
        ) from error


def _tied(model: nn.Module) -> set[str]:
    once = dict(model.named_parameters())
    return {name for name, _ in model.named_parameters(remove_duplicate=False) if name not in once}


def _files(folder: Path) -> list[Path]:
    """model.safetensors, or the files that the index beside them names."""
    index = folder / INDEX
    return indexed_files(index) if index.is_file() else [folder / WEIGHTS]


def indexed_files(index: Path) -> list[Path]:
    """The files beside an index, <name>.<kind>.index.json, that it names. Raises CheckpointError."""
    kind = Path(index.name.removesuffix(".index.json")).suffix
    places = read_json_object(index).get("weight_map")
    names = list(places.values()) if isinstance(places, dict) else []
    if not names or not all(
        isinstance(name, str) and name == Path(name).name and name.endswith(kind) for name in names
    ):
        raise CheckpointError(
            f"{index}: weight_map must name {kind} files of this folder; found {show(names[:3] or places)}"
        )
    return [index.parent / name for name in sorted(set(names))]


def is_plain(tensor: Tensor) -> bool:
    """Whether it holds a floating-point number for each element: neither quantized, nor sparse, nor complex."""
    return tensor.is_floating_point() and tensor.layout == torch.strided


def is_finite(tensor: Tensor) -> bool:
    if tensor.is_floating_point() and tensor.element_size() == 1:  # torch.isfinite knows none of eight bits
        tensor = tensor.float()
    return bool(torch.isfinite(tensor).all())


def unfit(theirs: Tensor, ours: Tensor) -> bool:
    """Whether a tensor of a file cannot be a weight, or a statistic, of the model."""
    return ours.is_floating_point() and not (is_plain(theirs) and is_finite(theirs))


def load_weights(model: nn.Module, folder: Path) -> dict[str, Any]:
    """Load `folder`'s weights into `model` and return the facts saved with them (step, metric).

    Raises:
        CheckpointError: names the file and the tensor that is missing, unknown or of another shape.
    """
    path = folder / WEIGHTS
    found: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for path in _files(folder):
        try:
            with open_regular(path), safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                facts |= _facts(file.metadata())
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be loaded: {error}") from error
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name not in _tied(model)}
    trained = {name for name, _ in model.named_parameters()}
    for name, tensor in found.items():
        if name not in wanted:
            raise CheckpointError(
                f"{path}: holds {name}, which this model does not have; is config.json from the same run?"
            )
        if wanted[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(tensor.shape)}, but this model's is {list(wanted[name].shape)}"
            )
        if name in trained and unfit(tensor, wanted[name]):
            raise CheckpointError(
                f"{path}: {name} does not hold a finite number for each element: the run has diverged, or the file is "
                "not as it was written: take an earlier checkpoint, launchers/export.py --step N"
            )
    if missing := sorted(set(wanted) - set(found)):
        raise CheckpointError(f"{path}: lacks {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}")
    model.load_state_dict(found, strict=False)
    return facts
