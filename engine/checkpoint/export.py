"""Whole weights from any checkpoint, as safetensors, read back and compared.

No model is built and no device is used; at most one output file is held in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from trunkline.engine.checkpoint.checkpoints import BACKEND
from trunkline.engine.checkpoint.manifest import Checkpoint
from trunkline.engine.checkpoint.weights import INDEX, WEIGHTS, metadata_of
from trunkline.engine.errors import CheckpointError, ConfigError
from trunkline.engine.machine.files import save_tensors, write_json
from trunkline.engine.machine.log import bars_are_hidden
from trunkline.engine.state.sharded_files import AVERAGE, BUFFER_AVERAGE, VALUE, Digests, ShardedFiles, digest

FileTensors = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def export_weights(
    found: Checkpoint, out: Path, max_shard_bytes: int, dtype: torch.dtype | None = None,
    called: Callable[[str], str | None] = lambda name: name, file_tensors: FileTensors = lambda tensors: tensors,
    facts: Mapping[str, float] | None = None, average: bool = False,
) -> list[Path]:  # fmt: skip
    """Write a checkpoint's parameters and buffers into `out` and return the files.

    `called` and `file_tensors` are the task's `tensor_name` and `file_tensors`; `facts` is what the files say of
    themselves. With `average` the moving average of the weights is written, where the checkpoint has one of them.

    One file is model.safetensors; several are model-00001-of-0000N.safetensors with model.safetensors.index.json.
    Floating-point parameters are cast to `dtype` if it is given; else they keep the checkpoint's precision.

    Raises:
        ConfigError: `out` is there and not empty.
        CheckpointError: names the file or the tensor that cannot be read, or that is not what was saved.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: is not an empty folder; choose another")
    out.mkdir(parents=True, exist_ok=True)
    files = ShardedFiles(found.path / BACKEND)
    shards = _plan(files, max_shard_bytes, dtype, called, file_tensors)
    names = [WEIGHTS] if len(shards) == 1 else [_shard_name(n + 1, len(shards)) for n in range(len(shards))]
    sizes = 0
    places: dict[str, str] = {}
    with tqdm(total=sum(map(len, shards)), desc="export", unit="tensor", disable=bars_are_hidden()) as bar:
        for name, shard in zip(names, shards, strict=True):
            held: dict[str, Tensor] = {}
            for key, new in shard.items():
                whole = _read(files, key, found.digests, average)
                held[new] = whole.to(_kind(files, key, whole.dtype, dtype))
                bar.update()
            tensors = {key: tensor.contiguous() for key, tensor in file_tensors(held).items()}
            sizes += sum(tensor.nbytes for tensor in tensors.values())
            places |= dict.fromkeys(tensors, name)
            save_tensors(tensors, out / name, metadata_of(facts or {}))
            _compare(out / name, tensors)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sizes}, "weight_map": places}
        write_json(out / INDEX, index)
        names.append(INDEX)
    return [out / name for name in names]


def _plan(
    files: ShardedFiles, max_shard_bytes: int, dtype: torch.dtype | None, called: Callable[[str], str | None],
    file_tensors: FileTensors,
) -> list[dict[str, str]]:  # fmt: skip
    """Which of the checkpoint's tensors go into which file, and what the task calls them, in the model's order.

    What is converted together stays together. If that is above the limit, it has a file of its own.
    """
    keys: dict[str, str] = {}
    shells: dict[str, Tensor] = {}
    for key, shape, own in _tensors(files):
        if (name := called(key)) is not None:
            keys[name] = key
            shells[name] = torch.empty(shape, dtype=_kind(files, key, own, dtype), device="meta")
    shards: list[dict[str, str]] = [{}]
    room = max_shard_bytes
    for group in _together(shells, file_tensors):
        size = sum(tensor.nbytes for tensor in file_tensors({name: shells[name] for name in group}).values())
        if size > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1] |= {keys[name]: name for name in group}
        room -= size
    return shards


def _together(shells: dict[str, Tensor], file_tensors: FileTensors) -> list[list[str]]:
    """The smallest sets of tensors of which each gives whole tensors of files, by trying on tensors without values."""
    whole = {name: tensor.shape for name, tensor in file_tensors(shells).items()}
    groups: dict[tuple[str, bool], list[str]] = {}  # those that make no whole alone by the first that they are part of
    for name, shell in shells.items():
        try:
            part = {new: tensor.shape for new, tensor in file_tensors({name: shell}).items()}
        except Exception:  # it cannot be converted without others
            part = {}
        alone = bool(part) and part.items() <= whole.items()
        groups.setdefault((name if alone else min(part, default=""), alone), []).append(name)
    made = [new for group in groups.values() for new in file_tensors({name: shells[name] for name in group})]
    return list(groups.values()) if sorted(made) == sorted(whole) else [list(shells)]


def _tensors(files: ShardedFiles) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    for name, shape in files.shapes.items():
        yield name, shape, files.dtype(name, VALUE)
    for name, buffer in files.buffers(0).items():
        yield name, tuple(buffer.shape), buffer.dtype


def _kind(files: ShardedFiles, key: str, own: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    """Buffers keep theirs, as in training: tables and statistics, of which fp16 would make infinities."""
    return asked if asked is not None and own.is_floating_point and key in files.shapes else own


def _read(files: ShardedFiles, key: str, digests: Digests, average: bool) -> Tensor:
    if key not in files.shapes:
        return (files.buffers(0) | (files.buffers(0, BUFFER_AVERAGE) if average else {}))[key]
    shape = files.shapes[key]
    kind = AVERAGE if average and AVERAGE in files.keys[key] else VALUE
    flat = files.elements(key, kind, 0, math.prod(shape))
    if digest(flat, 0) != digests.get(f"{key}:{kind}"):
        raise CheckpointError(f"{files.folder}: {key}: its elements are not those that were saved (digests differ)")
    return flat.view(shape)


def _compare(path: Path, tensors: dict[str, Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        for key, tensor in tensors.items():
            if not torch.equal(_bytes(file.get_tensor(key)), _bytes(tensor)):
                raise CheckpointError(f"{path}: {key}: what was read back is not what was written; check the disk")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"
