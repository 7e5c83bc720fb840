"""Weights of another project: read without running anything that they hold, and put into a model under its names.

    read_foreign(path)                    name -> tensor of a .safetensors, .pth, .pt or .bin file, or of a folder
    load_foreign(model, path, rename)     the same in the model's names and shapes, whole or not at all
    read_torch(path)                      all that torch.save wrote: tensors and plain values, such as an epoch

`rename` says what a tensor of the file is called in the model, and None of one that the model has no use for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trunkline.engine.checkpoint.weights import INDEX, WEIGHTS, indexed_files, is_plain, unfit
from trunkline.engine.errors import CheckpointError
from trunkline.engine.machine.reading import open_regular, reason

Rename = Callable[[str], str | None] | Mapping[str, str | None]
"""A function of a tensor's name, or a table in which names that stay as they are may be left out."""

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "weights")
"""Under which keys programs put a state dict among other things, the plainest first."""
_PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DistributedDataParallel, torch.compile and a class around the model put before each name."""
_COUNTERS = "*.num_batches_tracked"  # batch norms of older files have none, and nothing here reads them
_FOLDER = (INDEX, WEIGHTS, "pytorch_model.bin.index.json", "pytorch_model.bin")
_SHOWN = 10
_NUMBERS = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?")]


def load_foreign(
    model: nn.Module, path: Path, rename: Rename | None = None, *,
    reshape: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor, fresh: Sequence[str] = (),
) -> str:  # fmt: skip
    """Put the weights at `path` into a model that is not sharded. Returns a line for whoever starts the run.

    Args:
        rename: from names of the file to names of the model.
        reshape: what the model holds for a tensor of the file, given its name in the model: transposed, cut out.
        fresh: globs of the model's tensors that stay as they are where the file lacks them, or has other shapes: a
            head for other classes.

    Raises:
        CheckpointError: the file cannot be read, or does not fit; with the names that are missing, unexpected, or of
            other shapes. The model is as it was then.
    """
    found, prefix = _without_prefix(read_foreign(path), model, rename)
    named: dict[str, Tensor] = {}
    twice = []
    for name, tensor in found.items():
        if (called := _renamed(rename, name)) is not None:
            if called in named:
                twice.append(f"{name} (a second {called})")
            named[called] = reshape(called, tensor)
    state, ties = model.state_dict(), _ties(model)
    there = {name for names in ties if not named.keys().isdisjoint(names) for name in names} | named.keys()
    faults = {
        "tensors of the model that are missing there": [
            name for name in state if name not in there and not _is_one_of(name, (*fresh, _COUNTERS))
        ],
        "tensors there that the model does not have": [name for name in named if name not in state] + twice,
        "tensors of another shape": [
            f"{name} is {list(named[name].shape)}, but {list(tensor.shape)} in the model"
            for name, tensor in state.items()
            if name in named and named[name].shape != tensor.shape and not _is_one_of(name, fresh)
        ],
        "tensors without a finite floating-point number for each element": [
            name for name, tensor in named.items() if name in state and unfit(tensor, state[name])
        ],
        "names of one tensor in the model that hold two there": list(_torn(ties, named)),
    }
    if any(faults.values()):
        lists = [f"  {len(names)} {what}: {_first(names)}" for what, names in faults.items() if names]
        raise CheckpointError(
            "\n".join([f"{path}: does not fit this model{_stripped(prefix)}:", *lists, "  Is it of this architecture?"])
        )
    fitting = {name: tensor for name, tensor in named.items() if state[name].shape == tensor.shape}
    model.load_state_dict(fitting, strict=False)
    new = [name for name in state if _is_one_of(name, fresh) and name not in fitting]
    return f"{path}: {len(fitting)} tensors loaded{_stripped(prefix)}{f'; new are {_first(new)}' if new else ''}"


def read_foreign(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file, or of a folder as Hugging Face writes it, on the CPU. Raises CheckpointError."""
    tensors: dict[str, Tensor] = {}
    for file in _files(path):
        tensors |= _safetensors(file) if file.suffix == ".safetensors" else _state_dict(file)
    return tensors


def read_torch(path: Path) -> Any:
    """What torch.save wrote, if that is tensors, plain values and numpy's numbers; on the CPU. Nothing in it is run.

    Raises CheckpointError for anything else.
    """
    scalar = np.float64(0).__reduce__()[0]
    numbers: list[Any] = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    try:
        with open_regular(path) as file, torch.serialization.safe_globals([*numbers, np.dtype, *_NUMBERS]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error)}): check the path") from error
    except Exception as error:  # a damaged file makes torch raise anything
        named = re.search(r"(?:GLOBAL|global|[Cc]lass|function) ([\w.]+\.[\w.]+)", str(error))
        said = reason(error)
        # torch's own words say how to let it run
        what = f"it asks for {named[1]}" if named else type(error).__name__ if "weights_only" in said else said[:200]
        raise CheckpointError(
            f"{path}: is damaged, or holds more than tensors and plain values ({what}), and nothing in it is run: "
            "where it comes from, save torch.save(model.state_dict(), ...) or safetensors"
        ) from error


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    for name in _FOLDER:
        if (path / name).is_file():
            return indexed_files(path / name) if name.endswith(".json") else [path / name]
    raise CheckpointError(f"{path}: holds no weights under the names {', '.join(_FOLDER)}: name the file itself")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with open_regular(path), safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({reason(error)}): check the file") from error


def _state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, also one that stands among other things."""
    held = whole = read_torch(path)
    while isinstance(held, Mapping) and (
        inner := next((key for key in _WRAPPERS if _holds_tensors(held.get(key))), "")
    ):
        held = held[inner]
    if not _holds_tensors(held):
        keys = _first([str(key) for key in whole]) if isinstance(whole, Mapping) else type(whole).__name__
        raise CheckpointError(f"{path}: holds no named tensors, but {keys}: save a state dict")
    return {str(name): value for name, value in held.items() if isinstance(value, Tensor)}


def _holds_tensors(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    return any(isinstance(each, Tensor) or _holds_tensors(each) for each in value.values())


def _without_prefix(found: dict[str, Tensor], model: nn.Module, rename: Rename | None) -> tuple[dict[str, Tensor], str]:
    """The tensors without what stands before all their names, if more of them are the model's then."""
    known = set(model.state_dict())

    def fitting(tensors: dict[str, Tensor]) -> int:
        return len(known & {_renamed(rename, name) for name in tensors})

    best, stripped, shorter, taken = found, "", found, ""
    while shorter and (prefix := next((each for each in _PREFIXES if all(n.startswith(each) for n in shorter)), "")):
        shorter, taken = {name.removeprefix(prefix): tensor for name, tensor in shorter.items()}, taken + prefix
        if fitting(shorter) > fitting(best):
            best, stripped = shorter, taken
    return best, stripped


def _renamed(rename: Rename | None, name: str) -> str | None:
    if rename is None:
        return name
    return rename.get(name, name) if isinstance(rename, Mapping) else rename(name)


def _ties(model: nn.Module) -> list[list[str]]:
    """The names of each parameter, in the model's order."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return list(names.values())


def _torn(ties: list[list[str]], named: Mapping[str, Tensor]) -> Iterator[str]:
    for names in ties:
        held = [name for name in names if name in named and is_plain(named[name])]
        for name in held[1:]:
            if not torch.equal(named[held[0]], named[name]):
                yield f"{held[0]} and {name}"


def _is_one_of(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _first(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest


def _stripped(prefix: str) -> str:
    return f" (its names without '{prefix}')" if prefix else ""
