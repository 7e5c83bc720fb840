"""The state of a run in one form for every backend, stage and world size.

A rank holds, of each parameter, one run of consecutive elements: the whole of it, a ZeRO partition, the rows of an FSDP
shard. That is a `Fragment`. Each rank writes the elements that it owns, of the parameter, of everything that the
optimizer keeps for each element, and of the weights' average (backends/averaging.py), as they are, in fp32
masters, into the files of trunkline.engine.state.sharded_files.

So there is nothing to convert: any layout reads the elements that it needs from the files that have them, one fragment
at a time. Digests prove after loading that each element has come to its place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trunkline.engine.errors import CheckpointError
from trunkline.engine.machine.files import save_tensors
from trunkline.engine.ranks.distributed import Ranks, gather, sum_int64
from trunkline.engine.state.sharded_files import (
    AVERAGE,
    BUFFER,
    BUFFER_AVERAGE,
    VALUE,
    Digests,
    ShardedFiles,
    digest,
    file_names,
)


@dataclass(frozen=True)
class Fragment:
    """Elements `start` to `start + length` of a flattened parameter, as one rank holds them.

    `owner` is the tensor that the optimizer steps and under which it keeps its state; the elements begin at `offset` of
    its (local, flattened) storage; `length` may be 0. Where several ranks hold the same elements, each writes its share
    of them: `replicas` says how many do, `replica` which this one is.
    """

    name: str
    shape: tuple[int, ...]
    owner: Tensor
    offset: int
    start: int
    length: int
    replicas: int = 1
    replica: int = 0

    def share(self) -> tuple[int, int]:
        """The part [first, stop) of this fragment that this rank writes."""
        return self.length * self.replica // self.replicas, self.length * (self.replica + 1) // self.replicas


Averages = Mapping[Tensor, Tensor]
"""By the owner of fragments, as a rank holds it, or by a buffer: its moving average, of the shape of the local part."""


class Sharded(Protocol):
    """What is saved and loaded here: a backend."""

    module: nn.Module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """See trunkline.engine.backends.Backend."""

    def fragments(self) -> list[Fragment]:
        """See trunkline.engine.backends.Backend."""


@dataclass(frozen=True)
class Snapshot:
    """A rank's part of the state at one moment, copied to the CPU so that training can continue."""

    tensors: dict[str, Tensor]
    index: dict[str, Any]

    def write(self, folder: Path, rank: int, world_size: int) -> Digests:
        """Write this rank's two files into `folder` and return the digests of what is in them. Raises OSError."""
        tensors, index = (folder / name for name in file_names(rank, world_size))
        save_tensors(self.tensors, tensors)
        index.write_text(json.dumps(self.index))
        starts = {name: entry["start"] for name, entry in self.index["fragments"].items()}
        return {
            key: digest(tensor, starts[key.rpartition(":")[0]])
            for key, tensor in self.tensors.items()
            if not key.endswith((BUFFER, BUFFER_AVERAGE))
        }


@torch.no_grad()  # without it, taking the local part of a DTensor goes through autograd
def capture(backend: Sharded, averages: Averages | None = None) -> Snapshot:
    """Copy this rank's part of parameters, optimizer state, averages and persistent buffers."""
    averages = averages or {}
    tensors: dict[str, Tensor] = {}
    index: dict[str, Any] = {}
    for fragment in backend.fragments():
        first, stop = fragment.share()
        if first == stop:
            continue
        elementwise, scalars = _kept(backend.optimizer, fragment, averages)
        for key, tensor in elementwise.items():
            flat = _flat(tensor)[fragment.offset + first : fragment.offset + stop]
            tensors[f"{fragment.name}:{key}"] = flat.to("cpu", copy=True)
        index[fragment.name] = {
            "shape": fragment.shape, "start": fragment.start + first, "stop": fragment.start + stop,
            "keys": [*elementwise], "scalars": scalars,
        }  # fmt: skip
    for name, buffer in persistent_buffers(backend.module):
        tensors[name + BUFFER] = buffer.detach().to("cpu", copy=True).contiguous()
        if buffer in averages:
            tensors[name + BUFFER_AVERAGE] = averages[buffer].to("cpu", copy=True).contiguous()
    return Snapshot(tensors, {"fragments": index})


@torch.no_grad()
def restore(backend: Sharded, folder: Path, digests: Digests, ranks: Ranks, averages: Averages | None = None) -> None:
    """Overwrite parameters, optimizer state, averages and buffers with what `folder` holds, written on any layout.

    Called on all ranks. At most one fragment is held beside what is loaded into. What is frozen now has no optimizer
    state, also where some was saved. An average begins with the saved value where none was saved.

    Raises:
        CheckpointError: names the file, or the parameter that is missing, unknown or of another shape, or that differs
            from its digest after loading.
    """
    files = ShardedFiles(folder)
    fragments = backend.fragments()
    files.check_parameters({fragment.name: fragment.shape for fragment in fragments})
    problem = None
    try:
        _overwrite(backend, fragments, files, ranks.rank, averages or {})
    except CheckpointError as error:
        problem = str(error)
    if problems := [problem for problem in gather(problem, ranks) if problem]:
        raise CheckpointError(problems[0])
    _prove(backend, fragments, files, digests, ranks, averages)


def _overwrite(
    backend: Sharded, fragments: Sequence[Fragment], files: ShardedFiles, rank: int, averages: Averages
) -> None:
    of_owner: dict[int, list[Fragment]] = {}
    frozen = _frozen(backend)
    for fragment in fragments:
        if fragment.name not in frozen:
            of_owner.setdefault(id(fragment.owner), []).append(fragment)
        _fill(fragment.owner, fragment, _read(files, fragment, VALUE))
        if fragment.owner in averages:
            key = AVERAGE if AVERAGE in files.keys[fragment.name] else VALUE
            _fill(averages[fragment.owner], fragment, _read(files, fragment, key))
    for mine in of_owner.values():
        if not any(fragment.length for fragment in mine) and local_part(mine[0].owner).numel():
            continue  # this rank has no part in these parameters
        _restore_optimizer(backend.optimizer, mine, files)
    saved, saved_averages = files.buffers(rank), files.buffers(rank, BUFFER_AVERAGE)
    for name, buffer in persistent_buffers(backend.module):
        if name not in saved or saved[name].shape != buffer.shape:
            raise CheckpointError(f"{files.folder}: holds no buffer {name} of shape {list(buffer.shape)}")
        buffer.copy_(saved[name])
        if buffer in averages:
            averages[buffer].copy_(saved_averages.get(name, saved[name]))


def _frozen(backend: Sharded) -> set[str]:
    return {name for name, parameter in backend.module.named_parameters() if not parameter.requires_grad}


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the buffers that belong to a module's state."""
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def local_part(tensor: Tensor) -> Tensor:
    """The part of a DTensor that is on this rank; a plain tensor is all here."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach()


def _flat(tensor: Tensor) -> Tensor:
    return local_part(tensor).reshape(-1)


def _read(files: ShardedFiles, fragment: Fragment, key: str) -> Tensor:
    return files.elements(fragment.name, key, fragment.start, fragment.start + fragment.length)


def _fill(tensor: Tensor, fragment: Fragment, values: Tensor) -> None:
    local = local_part(tensor)
    if local.is_contiguous():
        local.view(-1)[fragment.offset : fragment.offset + fragment.length].copy_(values)
    else:  # a whole parameter in another memory format, such as channels-last
        local.copy_(values.view(local.shape))


def _state_of(optimizer: torch.optim.Optimizer, fragment: Fragment) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the optimizer keeps for the owner: tensors with a value for each of its elements, and plain numbers."""
    elementwise: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for key, value in optimizer.state.get(fragment.owner, {}).items():
        if value is None:
            continue
        if isinstance(value, Tensor) and value.dim() == 0 and (fragment.owner.dim() or key == "step"):
            scalars[key] = {"tensor": value.item()}
        elif not isinstance(value, Tensor):
            scalars[key] = value
        elif value.shape == fragment.owner.shape:
            elementwise[key] = value
        else:
            raise CheckpointError(
                f"{type(optimizer).__name__} keeps {key} of shape {list(value.shape)} for a parameter of shape "
                f"{list(fragment.owner.shape)}: such state cannot be split over ranks; use AdamW"
            )
    return elementwise, scalars


def _kept(
    optimizer: torch.optim.Optimizer, fragment: Fragment, averages: Averages
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors with a value for each element of the owner, itself first, and the optimizer's numbers."""
    elementwise, scalars = _state_of(optimizer, fragment)
    average = {AVERAGE: averages[fragment.owner]} if fragment.owner in averages else {}
    return {VALUE: fragment.owner, **elementwise, **average}, scalars


def _restore_optimizer(optimizer: torch.optim.Optimizer, fragments: Sequence[Fragment], files: ShardedFiles) -> None:
    """Rebuild the state of one owner from that of the parameters that lie in it."""
    owner = fragments[0].owner
    group = next((g for g in optimizer.param_groups if any(p is owner for p in g["params"])), {})
    state: dict[str, Any] = {}
    for fragment in fragments:
        for key in files.keys[fragment.name]:
            if key in (VALUE, AVERAGE):
                continue
            if key not in state:
                state[key] = torch.zeros_like(owner, dtype=files.dtype(fragment.name, key), requires_grad=False)
            _fill(state[key], fragment, _read(files, fragment, key))
        for key, value in files.scalars[fragment.name].items():
            if isinstance(value, dict):
                on_device = group.get("fused") or group.get("capturable")
                value = torch.tensor(value["tensor"], device=owner.device if on_device else "cpu")
            state[key] = value
    if state:
        optimizer.state[owner] = state


def _prove(
    backend: Sharded, fragments: Sequence[Fragment], files: ShardedFiles, digests: Digests, ranks: Ranks,
    averages: Averages | None,
) -> None:  # fmt: skip
    """Compare what is in place now, over all ranks, with the digests of what was saved."""
    frozen = _frozen(backend)
    digests = {
        entry: value
        for entry, value in digests.items()
        if entry.endswith(f":{VALUE}")
        or (entry.rpartition(":")[0] not in frozen and (averages is not None or not entry.endswith(f":{AVERAGE}")))
    }
    found = dict.fromkeys(digests, 0)
    saved_as = {f"{name}:{key}": files.dtype(name, key) for name, keys in files.keys.items() for key in keys}
    otherwise: set[str] = set()  # what this run keeps in another precision
    for fragment in fragments:
        first, stop = fragment.share()
        if first == stop:
            continue
        for key, tensor in _kept(backend.optimizer, fragment, averages or {})[0].items():
            entry = f"{fragment.name}:{key}"
            if tensor.dtype != saved_as.get(entry):
                otherwise.add(entry)
            elif entry in found:
                part = _flat(tensor)[fragment.offset + first : fragment.offset + stop]
                found[entry] += digest(part, fragment.start + first)
    totals = sum_int64([total % 2**64 for total in found.values()], ranks)
    otherwise = set().union(*gather(otherwise, ranks))
    for (entry, expected), total in zip(digests.items(), totals, strict=True):
        if entry not in otherwise and total % 2**64 != expected:
            raise CheckpointError(
                f"{files.folder}: {entry.replace(':', ', ')}: after loading, its elements are not those that were "
                "saved (their digests differ); the checkpoint cannot be loaded on this layout"
            )
