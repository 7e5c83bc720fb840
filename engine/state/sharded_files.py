"""The files of a run's state: which rank's file holds which elements.

    rank-00000-of-00002.safetensors   "<parameter>:value", "<parameter>:exp_avg", ...: the fragments, flat
    rank-00000-of-00002.json          where each fragment begins, the parameter's shape, the optimizer's scalars

ShardedFiles reads elements, whatever the number of ranks was. The digest of a tensor is a sum over its elements, hence
the same for every way of splitting it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trunkline.engine.data.randomness import finalise_array
from trunkline.engine.errors import CheckpointError
from trunkline.engine.machine.reading import read_object, reason

VALUE, AVERAGE = "value", "average"
BUFFER, BUFFER_AVERAGE = "#buffer", "#average"
Digests = dict[str, int]
"""By "<parameter>:<key>": the sum over the elements of a 64-bit hash of place and bits, modulo 2^64."""

_INDEX_NAME = re.compile(r"rank-[0-9]{5,}-of-([0-9]{5,})\.json")
_MAX_INDEX_BYTES = 1 << 30
_CHUNK = 1 << 16  # as much as a core keeps near it
_SPREAD = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


class ShardedFiles:
    """The files that all ranks wrote, read element by element, whatever the number of ranks was."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._indices: list[tuple[Path, dict[str, Any]]] = []
        self._open: dict[Path, Any] = {}
        for path in _written_together(folder):
            try:
                index = read_object(path, _MAX_INDEX_BYTES, finite=False, follow=False)["fragments"]
            except (OSError, ValueError, KeyError) as error:
                raise CheckpointError(f"{path}: cannot be read: {reason(error)}") from error
            self._indices.append((path.with_suffix(".safetensors"), index))
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.keys: dict[str, list[str]] = {}
        self.scalars: dict[str, dict[str, Any]] = {}
        for _, index in self._indices:
            for name, entry in index.items():
                self.shapes[name] = tuple(entry["shape"])
                self.keys[name] = entry["keys"]
                self.scalars[name] = entry["scalars"]

    def kept(self) -> dict[str, str]:
        """What the optimizer keeps for each parameter: the keys, and the numbers such as its count of steps, as text;
        "" where it keeps nothing, because the parameter was frozen or has never been used."""
        found = {
            name: ([k for k in keys if k not in (VALUE, AVERAGE)], self.scalars[name])
            for name, keys in self.keys.items()
        }
        return {name: json.dumps(state, sort_keys=True) if any(state) else "" for name, state in found.items()}

    def check_parameters(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raises CheckpointError unless these are the parameters, with their shapes, that the files hold."""
        for name, shape in shapes.items():
            if name not in self.shapes:
                raise CheckpointError(f"{self.folder}: lacks the parameter {name}; was it written by another model?")
            if self.shapes[name] != tuple(shape):
                raise CheckpointError(
                    f"{self.folder}: {name} has shape {list(self.shapes[name])}, but this model's is {list(shape)}"
                )
        if unknown := sorted(set(self.shapes) - set(shapes)):
            raise CheckpointError(f"{self.folder}: holds {unknown[0]}, which this model does not have")

    def elements(self, name: str, key: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of "<name>:<key>", flat. Raises CheckpointError."""
        parts: list[Tensor] = []
        reached = start
        for path, entry in self._parts(name):
            first, last = max(entry["start"], reached), min(entry["stop"], stop)
            if entry["start"] <= reached and first < last:
                if key not in entry["keys"]:
                    break
                try:
                    piece = self._file(path).get_slice(f"{name}:{key}")
                    parts.append(piece[first - entry["start"] : last - entry["start"]])
                except SafetensorError as error:
                    raise CheckpointError(f"{path}: {name}:{key} cannot be read: {error}") from error
                reached = last
        if reached != stop and stop > start:
            raise CheckpointError(f"{self.folder}: lacks elements from {reached} on of {name}:{key}")
        return torch.cat(parts) if parts else torch.empty(0)

    def dtype(self, name: str, key: str) -> torch.dtype:
        """The dtype in which "<name>:<key>" was saved."""
        return self.elements(name, key, 0, min(1, int(np.prod(self.shapes[name])))).dtype

    def buffers(self, rank: int, kind: str = BUFFER) -> dict[str, Tensor]:
        """The persistent buffers of a rank, or their averages; of rank 0's files if there were fewer ranks."""
        file = self._file(self._indices[rank if rank < len(self._indices) else 0][0])
        return {key.removesuffix(kind): file.get_tensor(key) for key in file.keys() if key.endswith(kind)}  # noqa: SIM118

    def _parts(self, name: str) -> list[tuple[Path, dict[str, Any]]]:
        found = [(path, index[name]) for path, index in self._indices if name in index]
        return sorted(found, key=lambda part: part[1]["start"])

    def _file(self, path: Path) -> Any:
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path}: cannot be read: {error}") from error
        return self._open[path]


def _written_together(folder: Path) -> list[Path]:
    """The indices of all ranks, in their order. Raises CheckpointError unless one whole set of them is there.

    What else lies there, such as a copy that a file manager made of one, is passed over.
    """
    names = {path.name for path in folder.glob("rank-*-of-*.json")}
    world_sizes = {int(found[1]) for name in names if (found := _INDEX_NAME.fullmatch(name))}
    sets = [[file_names(rank, size)[1] for rank in range(size)] for size in world_sizes if size <= len(names)]
    whole = [each for each in sets if each and names.issuperset(each)]
    if len(whole) != 1:
        raise CheckpointError(
            f"{folder}: expected rank-00000-of-N.json and those that follow, of one N; found {sorted(names)[:3]}"
        )
    return [folder / name for name in whole[0]]


def digest(values: Tensor, start: int) -> int:
    """The sum over `values`, elements from `start` on of a flattened tensor, of a hash of place and bits, mod 2^64."""
    bits = values.detach().cpu().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize])
    array = bits.numpy()
    total = 0
    for first in range(0, len(array), _CHUNK):
        part = array[first : first + _CHUNK].astype(np.int64).view(np.uint64)
        place = np.arange(start + first, start + first + len(part), dtype=np.uint64)
        total += int(finalise_array(part + place * np.uint64(_SPREAD)).sum(dtype=np.uint64))
    return total & _MASK


def add_digests(parts: Sequence[Digests]) -> Digests:
    """The digests of whole tensors, from those of the ranks' parts; in the same order on any number of ranks."""
    keys = sorted({key for part in parts for key in part})
    return {key: sum(part.get(key, 0) for part in parts) & _MASK for key in keys}


def file_names(rank: int, world_size: int) -> tuple[str, str]:
    """The two files that a rank writes: its tensors, and where their elements belong."""
    stem = f"rank-{rank:05d}-of-{world_size:05d}"
    return f"{stem}.safetensors", f"{stem}.json"
