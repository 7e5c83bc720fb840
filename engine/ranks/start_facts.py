"""What ranks must share besides their configuration: code and weights, as comparable values.

code_version()            versions of packages, and a digest of each of our source files
class_version(type(task)) the same of classes that may be anybody's
tensor_digests(model)     of each parameter and buffer, before a backend shards them
leaves(config)            nested objects by dotted keys
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_PACKAGES = ("trunkline", "torch", "deepspeed", "transformers", "tokenizers", "numpy", "triton")
_ROOT = Path(__file__).parents[2]
_FOLDERS = ("engine", "kernels", "launchers", "models")


def code_version() -> dict[str, str]:
    """The versions of what computes, and a digest of each of our own source files."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[f"version of {package}"] = importlib.metadata.version(package)
    files = sorted(path for folder in _FOLDERS for path in (_ROOT / folder).rglob("*.py"))
    return versions | {f"code of {path.relative_to(_ROOT)}": digest(path.read_bytes()) for path in files}


def class_version(*classes: type) -> dict[str, str]:
    """The names of classes, each with a digest of the file that defines it: a task or an optimizer may be anybody's."""
    found = {}
    for each in classes:
        path = getattr(sys.modules.get(each.__module__), "__file__", None)
        code = digest(Path(path).read_bytes()) if path and os.path.isfile(path) else "unknown"
        found[f"code of {each.__qualname__}"] = code
    return found


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested objects, by dotted keys."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        key: leaf
        for name, part in value.items()
        for key, leaf in leaves(part, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def tensor_digests(model: nn.Module) -> dict[str, str]:
    """Of each parameter and buffer of a model that is whole on this rank: shape, dtype and a digest of every bit."""
    named = [*model.named_parameters(), *model.named_buffers()]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing leaves Python's lock alone
        digests = pool.map(_tensor_digest, (tensor for _, tensor in named))
        return {f"initial value of {name}": found for (name, _), found in zip(named, digests, strict=True)}


def _tensor_digest(tensor: Tensor) -> str:
    facts = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    if tensor.is_meta or tensor.layout != torch.strided:
        return facts
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return f"{facts} {digest(flat.view(torch.uint8).numpy() if len(flat) else b'')}"  # an empty one has any stride


def digest(data: Any) -> str:
    """Of bytes, or of an array's: as much of SHA-256 as tells files and tensors apart."""
    return hashlib.sha256(data).hexdigest()[:16]
