"""Whole weights from any checkpoint: safetensors, sharded as Hugging Face does, written, read back and compared.

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

from engine.checkpoint import BACKEND, Checkpoint
from engine.errors import CheckpointError, ConfigError
from engine.files import save_tensors, write_json
from engine.sharded_files import VALUE, Digests, ShardedFiles, digest
from engine.weights import INDEX, WEIGHTS, metadata_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_weights(
    found: Checkpoint, out: Path, max_shard_bytes: int, dtype: torch.dtype | None = None,
    called: Callable[[str], str | None] = lambda name: name, facts: Mapping[str, float] | None = None,
) -> list[Path]:  # fmt: skip
    """Write a checkpoint's parameters and buffers into `out` and return the files. `called` is `Task.weight_name`,
    `facts` what the files say of themselves.

    One file is model.safetensors; several are model-00001-of-0000N.safetensors with model.safetensors.index.json.
    Floating-point tensors are cast to `dtype` if it is given; else they keep the checkpoint's precision.

    Raises:
        ConfigError: `out` is there and not empty.
        CheckpointError: names the file or the tensor that cannot be read, or that is not what was saved.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: is not an empty folder; choose another")
    out.mkdir(parents=True, exist_ok=True)
    files = ShardedFiles(found.path / BACKEND)
    shards = _plan(files, max_shard_bytes, dtype, called)
    names = [WEIGHTS] if len(shards) == 1 else [_shard_name(n + 1, len(shards)) for n in range(len(shards))]
    sizes = 0
    with tqdm(total=sum(map(len, shards)), desc="export", unit="tensor") as bar:
        for name, shard in zip(names, shards, strict=True):
            tensors: dict[str, Tensor] = {}
            for key, new in shard.items():
                whole = _read(files, key, found.digests)
                tensors[new] = whole.to(dtype) if dtype is not None and whole.is_floating_point() else whole
                sizes += tensors[new].nbytes
                bar.update()
            save_tensors(tensors, out / name, metadata_of(facts or {}))
            _compare(out / name, tensors)
    if len(shards) > 1:
        places = {new: name for name, shard in zip(names, shards, strict=True) for new in shard.values()}
        index = {"metadata": {"total_size": sizes}, "weight_map": places}
        write_json(out / INDEX, index)
        names.append(INDEX)
    return [out / name for name in names]


def _plan(
    files: ShardedFiles, max_shard_bytes: int, dtype: torch.dtype | None, called: Callable[[str], str | None]
) -> list[dict[str, str]]:
    """Which tensors go into which file, and by which names, in the model's order.

    A tensor above the limit has a file of its own.
    """
    shards: list[dict[str, str]] = [{}]
    room = max_shard_bytes
    for key, shape, own in _tensors(files):
        name = called(key)
        if name is None:
            continue
        size = math.prod(shape) * (dtype.itemsize if dtype is not None and own.is_floating_point else own.itemsize)
        if size > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][key] = name
        room -= size
    return shards


def _tensors(files: ShardedFiles) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    for name, shape in files.shapes.items():
        yield name, shape, files.dtype(name, VALUE)
    for name, buffer in files.buffers(0).items():
        yield name, tuple(buffer.shape), buffer.dtype


def _read(files: ShardedFiles, key: str, digests: Digests) -> Tensor:
    if key not in files.shapes:
        return files.buffers(0)[key]
    shape = files.shapes[key]
    flat = files.elements(key, VALUE, 0, math.prod(shape))
    if digest(flat, 0) != digests.get(f"{key}:{VALUE}"):
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
